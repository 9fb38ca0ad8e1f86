"""`occfeat-train figures --rerun FILE.rrd`: what the sheets show, as a recording for the viewer rerun (https://rerun.io).

Everything is in the ego frame of its keyframe. The timeline `keyframe` counts the keyframes drawn; the document `keyframe` names them.
Entities are `ego/CAMERA` with images, `ego/RUN/...` with voxels as boxes, and `notes/RUN`, which says what is simulated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from occfeat_targets.cache.geometry import Matrix, inverse_rigid
from occfeat_targets.cache.records import unique_suffix
from occfeat_targets.pictures.colors import Colors, FeatureColors, correlation_scale, rgb
from occfeat_train.report.correlation import Query, cosines
from occfeat_train.report.voxel_predictions import VoxelPredictions
from occfeat_train.training.saving import saving

JPEG_QUALITY = 90  # of the cached images, which were JPEGs


class Recorder:
    """Writes keyframes to one recording. rr: the module rerun. stream: its RecordingStream."""

    def __init__(self, rr: Any, stream: Any) -> None:
        self._rr, self._stream = rr, stream
        self._times: dict[tuple[str, int], int] = {}  # of (split, keyframe)
        stream.log("ego", rr.ViewCoordinates.FLU, static=True)

    def write_notes(self, run: str, lines: Sequence[str]) -> None:
        self._stream.log(["notes", run], self._rr.TextDocument("\n\n".join(lines)), static=True)

    def write_keyframe(
        self, run: str, found: VoxelPredictions, colors: FeatureColors, queries: Sequence[tuple[Query, float]]
    ) -> None:
        """queries: with the lowest cosine that their colours show."""
        key = found.split, found.keyframe
        is_first = key not in self._times
        self._stream.set_time("keyframe", sequence=self._times.setdefault(key, len(self._times)))
        if is_first:
            self._stream.log("keyframe", self._rr.TextDocument(found.name))
            self._write_cameras(found)
        self._stream.log(["ego", run], self._pose(inverse_rigid(found.grid_from_ego)))
        voxels = {"predicted": found.predicted, "target": found.target, "predicted to be occupied": found.imagined}
        for name, seen in voxels.items():
            if seen is None:
                continue
            self._write_voxels([run, "features", name], found, seen.voxels, colors(seen.features))
            for query, lowest in queries:
                cosine = cosines(seen.features, query.target if seen is found.target else query.predicted)
                path = [run, f"correlation with {query.name}", name]
                self._write_voxels(path, found, seen.voxels, rgb(correlation_scale(lowest), cosine))

    def _write_cameras(self, found: VoxelPredictions) -> None:
        names = ("images", "intrinsics", "cam_from_ego", "camera_valid")
        values = (found.reader.read(name, found.keyframe) for name in names)
        cameras = found.reader.cache.spec.cameras
        for name, image, intrinsics, cam_from_ego, is_valid in zip(cameras, *values, strict=True):
            path = ["ego", name]
            if not is_valid:
                self._stream.log(path, self._rr.Clear(recursive=True))
                continue
            self._stream.log(path, self._pose(inverse_rigid(cam_from_ego.astype(np.float64))))
            height, width = image.shape[:2]
            pinhole = self._rr.Pinhole(image_from_camera=intrinsics, resolution=[width, height], camera_xyz=self._rr.ViewCoordinates.RDF)  # fmt: skip
            self._stream.log(path, pinhole)
            self._stream.log(path, self._rr.Image(image).compress(jpeg_quality=JPEG_QUALITY))

    def _write_voxels(self, path: list[str], found: VoxelPredictions, voxels: Any, colors: Colors) -> None:
        half_size = [size / 2 for size in found.grid.cell_size[::-1]]
        boxes = self._rr.Boxes3D(centers=found.grid.centers_of(voxels), half_sizes=[half_size], colors=colors, fill_mode="solid")  # fmt: skip
        self._stream.log(["ego", *path], boxes)

    def _pose(self, parent_from_child: Matrix) -> Any:
        return self._rr.Transform3D(translation=parent_from_child[:3, 3], mat3x3=parent_from_child[:3, :3])


@contextlib.contextmanager
def recording(file: Path | None) -> Iterator[Recorder | None]:
    """A recorder whose recording appears under its name when it is complete; None without a file.

    Raises ValueError if rerun is not installed.
    """
    if file is None:
        yield None
        return
    try:
        import rerun as rr
    except ImportError as err:
        raise ValueError(
            f"--rerun {file} needs the package rerun-sdk ({err}): pip install -e '.[train,rerun]', with NumPy 2"
        ) from err
    partial = file.with_name(f".{file.name}.{unique_suffix()}.partial")
    stream = rr.RecordingStream("occfeat-train figures")
    with saving(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        stream.save(partial)
    try:
        yield Recorder(rr, stream)
        stream.flush()
        stream.disconnect()
        with saving(file):
            partial.replace(file)
    finally:
        stream.disconnect()
        partial.unlink(missing_ok=True)

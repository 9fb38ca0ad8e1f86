"""Check whether a cache can be trained on: read random keyframes like training does, and measure them."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from occfeat_targets.cache.geometry import inverse_rigid
from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.common.plural import count
from occfeat_train.data.frames import has_grid, none_left, reference_frames, why_left_out
from occfeat_train.ops.mean_over_views import sample_voxel_features_numpy


@dataclass(frozen=True)
class Readiness:
    """Measurements of `check_cache`, as means over the keyframes read.

    num_masked: masked cameras of the cache's valid keyframes. occupied: occupied voxels of the first reference frame with a grid; seen: fraction of them with a view, whose features are distilled.
    left_out: {use of the cache: (valid keyframes without a grid in its default reference frames, their names)}.
    views: views per seen voxel. read_seconds, target_seconds: time to read a keyframe, and to sample its target features.
    """

    num_keyframes: int
    num_skipped: int
    num_masked: int
    left_out: dict[str, tuple[int, tuple[str, ...]]]
    num_valid: int
    occupied: float
    seen: float
    views: float
    megabytes: float
    read_seconds: float
    target_seconds: float

    @property
    def ready_for(self) -> list[str]:
        """Uses for which a keyframe is left."""
        return [use for use, (number, _) in self.left_out.items() if number < self.num_valid]

    def describe(self) -> list[str]:
        lines = [
            f"{count(self.num_keyframes, 'keyframe')} read; {count(self.num_skipped, 'masked keyframe')} in the cache (skipped by the build)",
            f"occupied voxels: {self.occupied:.0f} per keyframe",
            f"reading: {self.read_seconds * 1e3:.2f} ms and {self.megabytes:.2f} MB per keyframe, with checksums",
        ]
        if self.num_masked:
            lines[0] += f"; {count(self.num_masked, 'masked camera')} in other keyframes"
        lines += [
            f"{use} leaves out {number} of {self.num_valid} valid keyframes, unless --set frame=... is passed: {why_left_out(frames)}"
            for use, (number, frames) in self.left_out.items()
            if number
        ]
        if self.views:
            lines.insert(
                2,
                f"  {self.seen:.1%} of them are seen by a camera, with {self.views:.2f} views each; their features are distilled",
            )
            lines.append(f"sampling target features: {self.target_seconds * 1e3:.2f} ms per keyframe on one core")
        return lines


def _left_out(reader: CacheReader, *, training: bool) -> tuple[int, tuple[str, ...]]:
    """Number of valid keyframes without a grid in the default reference frames, and the names of these frames."""
    names = reader.cache.spec.frames
    frames = reference_frames(names, "auto", training=training)
    without = reader.is_valid & ~has_grid(reader)[:, frames].any(axis=1)
    return int(without.sum()), tuple(names[i] for i in frames)


def check_cache(reader: CacheReader, num_keyframes: int, seed: int = 0) -> Readiness:
    """Read all arrays of random keyframes, and sample their target features.

    Raises CacheError if a chunk is damaged or lost, and ValueError if no keyframe is left for training or a target is
    not finite.
    """
    reader.cache.require_files()
    valid = np.flatnonzero(reader.is_valid)
    if not len(valid):
        raise ValueError(
            f"{reader.cache.path} has no valid keyframe: the build skipped all of them; see 'occfeat-targets status'"
        )
    spec = reader.cache.spec
    left_out = {use: _left_out(reader, training=use == "training") for use in ("training", "evaluation")}
    number, frames = left_out["training"]
    if number == len(valid):
        raise ValueError(
            f"{reader.cache.path}: none of its {number} valid keyframes can be used: {none_left(spec.frames, frames)}"
        )
    names = [array.name for array in spec.arrays()]
    chosen = np.random.default_rng(seed).permutation(valid[has_grid(reader)[valid].any(axis=1)])[:num_keyframes]
    occupied, seen, views, reading, sampling = [], [], [], [], []
    for keyframe in [chosen[0], *chosen]:  # the first one twice, because it includes reading indices and compilation
        start = time.perf_counter()
        arrays = reader.read_all(names, int(keyframe))
        reading.append(time.perf_counter() - start)
        start = time.perf_counter()
        frame = int(arrays["grid_from_ego"].any(axis=(1, 2)).argmax())
        volume = spec.grid.unpack_volume(arrays["occupancy"][frame])
        centers = spec.grid.centers_of(np.flatnonzero(volume))
        occupied.append(len(centers))
        if spec.teacher is not None:
            ego_from_grid = inverse_rigid(arrays["grid_from_ego"][frame].astype(np.float64))
            targets, num_views = sample_voxel_features_numpy(
                arrays["features"],
                arrays.get("feature_scale"),
                arrays["cam_from_ego"] @ ego_from_grid,
                arrays["intrinsics"],
                spec.image_size,
                centers,
                area=arrays["image_area"].astype(np.float64),
            )
            if not np.isfinite(targets).all():
                raise ValueError(
                    f"sample {reader.cache.identity.tokens[keyframe]}: a target feature is not finite: rebuild the cache"
                )
            seen.append(float((num_views > 0).mean()))
            views.append(float(num_views[num_views > 0].mean()))
        sampling.append(time.perf_counter() - start)
    return Readiness(
        num_keyframes=len(chosen),
        num_skipped=len(reader) - len(valid),
        num_masked=int((~reader.camera_valid[valid]).sum()),
        left_out=left_out,
        num_valid=len(valid),
        occupied=float(np.mean(occupied[1:])),
        seen=float(np.mean(seen[1:])) if seen else 0.0,
        views=float(np.mean(views[1:])) if views else 0.0,
        megabytes=sum(array.nbytes for array in spec.arrays()) / 1e6,
        read_seconds=float(np.mean(reading[1:])),
        target_seconds=float(np.mean(sampling[1:])),
    )

"""The sheet of one keyframe: images with projected voxels or returns, features in RGB, and the grid from above."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from occfeat_targets.cache.geometry import Matrix, inverse_rigid, transform
from occfeat_targets.cache.labels import LABEL_KINDS, LabelKind
from occfeat_targets.cache.reader import CacheReader, frame_index
from occfeat_targets.cache.store import Cache
from occfeat_targets.pictures.bands import (
    MARGIN,
    WIDTH,
    Band,
    heading_band,
    stack,
    text_band,
    warning_bands,
)
from occfeat_targets.pictures.birdseye import (
    BODY_HEIGHT,
    coincidence_colors,
    instance_colors,
    label_colors,
    observed_colors,
    occupancy_colors,
    occupied_at_body_height,
)
from occfeat_targets.pictures.cameras import RETURN, VOXEL, Cameras, Dot, read_features
from occfeat_targets.pictures.canvas import default_style
from occfeat_targets.pictures.colors import (
    COINCIDENT,
    EMPTY,
    FREE,
    OCCUPIED,
    OCCUPIED_ONLY,
    SOLID,
    Colors,
    FeatureColors,
    depth_scale,
    height_scale,
    rgb,
    swatch,
)
from occfeat_targets.pictures.panels import Panel, map_bands


@default_style()
def draw_keyframe(
    reader: CacheReader,
    keyframe: int,
    *,
    frame: str | None = None,
    returns: NDArray[Any] | None = None,
    feature_colors: FeatureColors | None = None,
) -> Figure:
    """The sheet of one keyframe, or a sheet with a large notice if it was skipped or is not built.

    frame: reference frame of the grid; the cache's first by default. returns: (n, 3) LiDAR returns in the ego frame at
    LiDAR time [m], drawn on a second copy of the images. feature_colors: shared by several sheets; fitted to this keyframe
    by default. Raises ValueError if the cache does not have the frame, IndexError if it does not have the keyframe.
    """
    index = frame_index(reader.cache, frame)
    bands = _title(reader.cache, keyframe, index)
    absent = why_absent(reader, keyframe) or _why_no_grid(reader, keyframe, index)
    if absent is not None:
        bands += [text_band(absent[0], 44, margin=60), text_band(absent[1], 17, margin=40)]
    else:
        scene = Scene(reader, keyframe, index)
        bands += [*scene.views(returns, feature_colors), *scene.maps()]
    return stack(bands)


def why_absent(reader: CacheReader, keyframe: int) -> tuple[str, str] | None:
    """(headline, reason) if a keyframe has no targets, else None."""
    cache = reader.cache
    record = reader.records.get(keyframe // cache.keyframes_per_shard)
    if record is None:
        return "NOT BUILT YET", "Run the same 'occfeat-targets build' again: it continues."
    if reader.is_valid[keyframe]:
        return None
    reason = record["skipped"].get(cache.identity.tokens[keyframe], "The cache does not say why.")
    return "SKIPPED: this keyframe has no targets", reason


def _why_no_grid(reader: CacheReader, keyframe: int, index: int) -> tuple[str, str] | None:
    """(headline, reason) if a keyframe has no grid in this reference frame, else None."""
    if reader.read("grid_from_ego", keyframe)[index].any():
        return None
    name = reader.cache.spec.frames[index]
    return f"NO GRID: {name} is masked", "'occfeat-targets status' says why. Choose another --frame."


def _title(cache: Cache, keyframe: int, index: int) -> list[Band]:
    spec, identity = cache.spec, cache.identity
    if not 0 <= keyframe < len(cache):
        raise IndexError(f"keyframe {keyframe} of a cache of {len(cache)}")
    title = f"{identity.tokens[keyframe]}   {identity.scenes[keyframe]}   {cache.path.stem} {keyframe} of {len(cache)}"
    teacher = "no teacher" if spec.teacher is None else f"teacher {spec.teacher.name} ({spec.teacher.digest})"
    caption = f"cache {spec.fingerprint}; {teacher}; grid {spec.grid} in frame {spec.frames[index]}"
    return [text_band(title, 20), text_band(caption, 12, color="#555", margin=2), *warning_bands(cache.warnings)]


class Scene:
    """What a sheet shows of a keyframe: its cameras, and its grid in one reference frame. index: of that frame."""

    def __init__(self, reader: CacheReader, keyframe: int, index: int) -> None:
        self.reader, self.keyframe, self.index = reader, keyframe, index
        self.grid, self.height = reader.cache.spec.grid, height_scale(reader.cache.spec.grid)
        self.cameras = Cameras(reader, keyframe, WIDTH, MARGIN)
        self.grid_from_ego: Matrix = reader.read("grid_from_ego", keyframe)[index].astype(np.float64)
        self.volume = self.grid.unpack_volume(reader.read("occupancy", keyframe)[index])

    def views(self, returns: NDArray[Any] | None, feature_colors: FeatureColors | None) -> list[Band]:
        """The images of all cameras with voxels, with returns, and the teacher's features."""
        cameras = self.cameras
        centers = self.grid.centers_of(np.flatnonzero(self.volume)).astype(np.float64)
        voxels = transform(inverse_rigid(self.grid_from_ego), centers)

        def dots(dot: Dot, points: NDArray[Any], colors: Colors | ScalarMappable) -> Band:
            def draw(part: SubFigure) -> None:
                for camera, axes in cameras.draw(part).items():
                    cameras.draw_points(axes, camera, dot, points, colors)

            return cameras.height, draw

        def draw_features(part: SubFigure) -> None:
            features, is_shown = read_features(self.reader, self.keyframe)
            colors = (feature_colors or FeatureColors.fit(features[is_shown]))(features)
            cameras.draw(part, np.where(is_shown[..., None], colors, np.uint8(0)))

        heading = heading_band("centres of occupied voxels, by height in the grid", self.height)
        bands = [heading, dots(VOXEL, voxels, rgb(self.height, centers[:, 2]))]
        if returns is not None:
            bands += [heading_band("LiDAR returns, by depth", depth_scale()), dots(RETURN, returns, depth_scale())]
        if self.reader.cache.spec.teacher is not None:
            heading = heading_band("teacher features: three principal components as red, green and blue")
            bands += [heading, (cameras.height, draw_features)]
        return bands

    def maps(self) -> list[Band]:
        """The bird's-eye pictures, in rows."""
        return map_bands(self.panels(), self.grid, self.grid_from_ego, self.cameras)

    def panels(self) -> list[Panel]:
        """Occupancy, labels, the coincidence of both, instances, and what the rays observed, as far as the cache has them."""
        title = f"{int(self.volume.sum())} occupied voxels, the highest of each column"
        panels = [Panel(title, occupancy_colors(self.volume, self.height, self.grid), scale=self.height)]
        kinds = [LABEL_KINDS[name] for name in self.reader.cache.spec.labels]
        masks, invalid = {}, {}
        for kind in kinds:
            labels, is_valid = self.reader.read_labels(kind, self.keyframe)
            masks[kind.name] = labels[self.index]
            if is_valid is not None:
                invalid[f"{kind.invalid}, not scored"] = ~is_valid[self.index]
        if kinds:
            key = [swatch(color, name.replace("_", " ")) for kind in kinds for name, color in kind.colors.items()]
            key += [Patch(facecolor="white", hatch="//////", label=name) for name in invalid]
            hatched = np.any(list(invalid.values()), axis=0) if invalid else None
            title = f"labels: {', '.join(masks)}"
            panels.append(Panel(title, label_colors(masks, self.grid.map_shape), key, hatched))
        solid = [kind.name for kind in kinds if kind.is_solid]
        if solid:
            names = ", ".join(solid)
            cells = np.any([masks[name].any(axis=0) for name in solid], axis=0)
            occupied = occupied_at_body_height(self.volume, self.grid, inverse_rigid(self.grid_from_ego))
            shares = [100 * float(occupied[m].mean()) if m.any() else 0.0 for m in (cells, ~cells)]
            title = f"{names} and voxels {BODY_HEIGHT[0]:g}-{BODY_HEIGHT[1]:g} m above ground: they must coincide"
            key = [
                swatch(COINCIDENT, f"both ({shares[0]:.1f} % of the cells of {names})"),
                swatch(SOLID, f"{names} alone"),
                swatch(OCCUPIED_ONLY, f"voxel alone ({shares[1]:.1f} % of the other cells)"),
            ]
            panels.append(Panel(title, coincidence_colors(cells, occupied), key))
        panels += [self._instances(kind) for kind in kinds if kind.instances and self.reader.cache.spec.instances]
        if self.reader.cache.spec.rays:
            panels.append(self._observed())
        return panels

    def _instances(self, kind: LabelKind) -> Panel:
        squared, offset = (
            self.reader.read(name, self.keyframe)[self.index] for name in (kind.center_array, kind.offset_array)
        )
        directions = {"right": (1, 0), "ahead": (0, 1), "left": (-1, 0), "behind": (0, -1)}
        key = []
        for name, (right, forward) in directions.items():
            one = np.array([right, forward], np.int16).reshape(2, 1, 1)
            key.append(
                swatch(tuple(instance_colors(np.zeros((1, 1), np.uint8), one)[0, 0].tolist()), f"{name} of its centre")
            )
        title = f"{kind.name}: {int((squared == 0).sum())} centres (dark), offsets of cells from them"
        return Panel(title, instance_colors(squared, offset), key)

    def _observed(self) -> Panel:
        observed, free = self.grid.unpack_volume(self.reader.read("rays", self.keyframe)[self.index])
        title = f"{100 * observed.mean():.1f} % of the voxels are observed by the LiDAR's rays"
        key = [
            swatch(OCCUPIED, "column with an occupied voxel"),
            swatch(FREE, "column with free voxels"),
            swatch(EMPTY, "column that no ray has passed"),
        ]
        return Panel(title, observed_colors(self.volume, free), key)

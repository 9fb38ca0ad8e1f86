"""The sheet of one keyframe: images with projected voxels or returns, features in RGB, and the grid from above."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from occfeat_targets.cache.geometry import Matrix, inverse_rigid, project, transform
from occfeat_targets.cache.labels import LABEL_KINDS
from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.cache.spec import CAMERAS, TargetSpec
from occfeat_targets.cache.store import Cache
from occfeat_targets.pictures.birdseye import (
    BODY_HEIGHT,
    BirdsEye,
    coincidence_colors,
    label_colors,
    occupancy_colors,
    occupied_at_body_height,
)
from occfeat_targets.pictures.colors import (
    COINCIDENT,
    FAINT,
    HATCH,
    OCCUPIED_ONLY,
    PAPER,
    RGB,
    VEHICLE,
    ColorScale,
    FeatureColors,
)
from occfeat_targets.pictures.drawing import draw_banner, draw_dots, draw_key, draw_lines, draw_scale, draw_tag, wrap

WIDTH, MARGIN, GAP, COLUMNS = 1920, 16, 8, 3  # [px]
TILE_WIDTH = (WIDTH - 2 * MARGIN - (COLUMNS - 1) * GAP) // COLUMNS
RULER = 26  # [px] left of and below a bird's-eye picture, for its ruler
DEPTH = ColorScale("LiDAR returns by depth", 0, 50, is_reversed=True)
VOXEL_RADIUS, VOXEL_PIXELS = 0.1, (1.5, 6.0)  # of a dot: [m], clamped to [px]
RETURN_RADIUS, RETURN_PIXELS = 0.03, (0.8, 2.5)
CAPTIONS = {
    "voxels": "centres of occupied voxels",
    "returns": "LiDAR returns",
    "features": "teacher features, 3 principal components",
}


@dataclass(frozen=True)
class Layout:
    """Positions of the cameras' pictures on a sheet [px]: arranged as on the car, in rows per kind of picture.

    kinds: some of CAPTIONS. top: y of the first row.
    """

    spec: TargetSpec
    kinds: tuple[str, ...]
    top: int

    @property
    def tile(self) -> tuple[int, int]:
        """(width, height) of a camera's picture."""
        return TILE_WIDTH, max(1, round(TILE_WIDTH * self.spec.image_size[0] / self.spec.image_size[1]))

    def corner(self, camera: int, kind: str) -> tuple[int, int]:
        """(x, y) of the upper left corner of a camera's picture."""
        row, column = divmod(self._slot(camera), COLUMNS)
        row = row * len(self.kinds) + self.kinds.index(kind)
        return MARGIN + column * (TILE_WIDTH + GAP), self.top + row * (self.tile[1] + GAP)

    @property
    def bottom(self) -> int:
        """y of the bird's-eye pictures."""
        rows = max(self._slot(camera) for camera in range(len(self.spec.cameras))) // COLUMNS + 1
        return self.top + rows * len(self.kinds) * (self.tile[1] + GAP)

    def _slot(self, camera: int) -> int:
        """Position of a camera: front left, front, front right, then the back; in the spec's order for unknown names."""
        names = self.spec.cameras
        return CAMERAS.index(names[camera]) if set(names) <= set(CAMERAS) else camera


def draw_keyframe(
    reader: CacheReader,
    keyframe: int,
    *,
    frame: str | None = None,
    returns: NDArray[Any] | None = None,
    feature_colors: FeatureColors | None = None,
) -> Image.Image:
    """The sheet of one keyframe, or a sheet with a large notice if it was skipped or is not built.

    frame: reference frame of the grid; the cache's first by default. returns: (n, 3) LiDAR returns in the ego frame at
    LiDAR time [m], drawn on a second copy of the images. feature_colors: shared by several sheets; fitted to this keyframe
    by default. Raises ValueError if the cache does not have the frame, IndexError if it does not have the keyframe.
    """
    spec, index = reader.cache.spec, frame_index(reader.cache, frame)
    sheet = Image.new("RGB", (WIDTH, 16_000), PAPER)
    top = _draw_title(sheet, reader.cache, keyframe, index)
    absent = why_absent(reader, keyframe)
    if absent is not None:
        top = draw_lines(sheet, MARGIN, top + 60, [absent[0]], 72)
        top = draw_lines(sheet, MARGIN, top + 20, wrap(absent[1], WIDTH - 2 * MARGIN, 24), 24)
        return sheet.crop((0, 0, WIDTH, top + 60))
    height_scale = ColorScale("occupied voxels by height in the grid", spec.grid.lower[0], spec.grid.upper[0])
    right = draw_scale(sheet, MARGIN, top, height_scale)
    if returns is not None:
        draw_scale(sheet, right, top, DEPTH)
    kinds = ["voxels"] + ["returns"] * (returns is not None) + ["features"] * (spec.teacher is not None)
    layout = Layout(spec, tuple(kinds), top + 32)
    _draw_views(sheet, layout, reader, keyframe, index, height_scale, returns)
    if spec.teacher is not None:
        _draw_features(sheet, layout, read_features(reader, keyframe), feature_colors)
    bottom = _draw_maps(sheet, layout.bottom + GAP, reader, keyframe, index, height_scale)
    return sheet.crop((0, 0, WIDTH, bottom + MARGIN))


def frame_index(cache: Cache, frame: str | None) -> int:
    """Index of a reference frame. Raises ValueError if the cache has no grid in that frame."""
    frames = cache.spec.frames
    if frame is not None and frame not in frames:
        raise ValueError(f"{cache.path} has no grid in frame {frame!r}: choose one of {', '.join(frames)} with --frame")
    return frames.index(frame) if frame is not None else 0


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


def read_features(reader: CacheReader, keyframe: int) -> NDArray[np.float32]:
    """(cams, h, w, C) teacher features of a keyframe, int8 ones multiplied by their scale."""
    features = reader.read("features", keyframe).astype(np.float32)
    if reader.cache.spec.feature_dtype == "int8":
        features *= reader.read("feature_scale", keyframe)[..., None].astype(np.float32)
    return features


def _draw_title(sheet: Image.Image, cache: Cache, keyframe: int, index: int) -> int:
    spec, identity = cache.spec, cache.identity
    if not 0 <= keyframe < len(cache):
        raise IndexError(f"keyframe {keyframe} of a cache of {len(cache)}")
    title = f"{identity.tokens[keyframe]}   {identity.scenes[keyframe]}   {cache.path.stem} {keyframe} of {len(cache)}"
    teacher = "no teacher" if spec.teacher is None else f"teacher {spec.teacher.name} ({spec.teacher.digest})"
    caption = f"cache {spec.fingerprint}; {teacher}; grid {spec.grid} in frame {spec.frames[index]}"
    top = draw_lines(sheet, MARGIN, 12, [title], 27)
    top = draw_lines(sheet, MARGIN, top, wrap(caption, WIDTH - 2 * MARGIN, 17), 17, FAINT) + 4
    warnings = [line for text in cache.warnings for line in wrap(text, WIDTH - 2 * MARGIN, 24)]
    return draw_banner(sheet, top, warnings) + 10 if warnings else top + 6


def _draw_views(
    sheet: Image.Image,
    layout: Layout,
    reader: CacheReader,
    keyframe: int,
    index: int,
    height_scale: ColorScale,
    returns: NDArray[Any] | None,
) -> None:
    spec = reader.cache.spec
    grid_from_ego = reader.read("grid_from_ego", keyframe)[index].astype(np.float64)
    volume = spec.grid.unpack_volume(reader.read("occupancy", keyframe)[index])
    centers = spec.grid.centers_of(np.flatnonzero(volume)).astype(np.float64)
    clouds = {"voxels": transform(inverse_rigid(grid_from_ego), centers)}
    if returns is not None:
        clouds["returns"] = np.asarray(returns, np.float64)
    images, intrinsics = reader.read("images", keyframe), reader.read("intrinsics", keyframe).astype(np.float64)
    cam_from_ego = reader.read("cam_from_ego", keyframe).astype(np.float64)
    enlargement = np.array(layout.tile) / spec.image_size[::-1]
    for camera, name in enumerate(spec.cameras):
        for kind, points in clouds.items():
            tile = Image.fromarray(images[camera]).resize(layout.tile, Image.Resampling.BICUBIC)
            points_cam = transform(cam_from_ego[camera], points)
            pixels, depth, is_valid = project(intrinsics[camera], points_cam, spec.image_size)
            pixels, depth = pixels[is_valid] * enlargement, depth[is_valid]
            focal = intrinsics[camera, 0, 0] * enlargement[0] / depth
            if kind == "voxels":
                colors = height_scale.colors(centers[is_valid, 2])
                draw_dots(tile, pixels, depth, colors, np.clip(VOXEL_RADIUS * focal, *VOXEL_PIXELS), rim=0.8)
            else:
                draw_dots(tile, pixels, depth, DEPTH.colors(depth), np.clip(RETURN_RADIUS * focal, *RETURN_PIXELS))
            draw_tag(tile, f"{name}: {CAPTIONS[kind]}")
            sheet.paste(tile, layout.corner(camera, kind))


def _draw_features(
    sheet: Image.Image, layout: Layout, features: NDArray[np.float32], feature_colors: FeatureColors | None
) -> None:
    colors = (feature_colors or FeatureColors.fit(features.reshape(-1, features.shape[-1])))(features)
    for camera, name in enumerate(layout.spec.cameras):
        tile = Image.fromarray(colors[camera]).resize(layout.tile, Image.Resampling.NEAREST)
        draw_tag(tile, f"{name}: {CAPTIONS['features']}")
        sheet.paste(tile, layout.corner(camera, "features"))


def _draw_maps(
    sheet: Image.Image, top: int, reader: CacheReader, keyframe: int, index: int, height_scale: ColorScale
) -> int:
    """Occupancy from above, labels, and both; returns the y below them [px]."""
    spec, grid = reader.cache.spec, reader.cache.spec.grid
    grid_from_ego: Matrix = reader.read("grid_from_ego", keyframe)[index].astype(np.float64)
    volume = grid.unpack_volume(reader.read("occupancy", keyframe)[index])
    kinds = [LABEL_KINDS[name] for name in spec.labels]
    masks, invalid = {}, {}
    for kind in kinds:
        all_masks, is_valid = reader.read_labels(kind, keyframe)
        masks[kind.name] = all_masks[index]
        if is_valid is not None:
            invalid[f"{kind.invalid}, not scored"] = ~is_valid[index]
    view = BirdsEye(grid, TILE_WIDTH - RULER + 2)
    picture = view.draw(occupancy_colors(volume, grid, height_scale), grid_from_ego)
    grid_from_cams = grid_from_ego @ inverse_rigid(reader.read("cam_from_ego", keyframe).astype(np.float64))
    view.draw_cameras(picture, grid_from_cams, spec.cameras)
    title = f"{int(volume.sum())} occupied voxels, the highest of each column"
    panels: list[tuple[str, Image.Image, dict[str, RGB]]] = [(title, picture, {})]
    if kinds:
        key: dict[str, RGB] = {name: color for kind in kinds for name, color in kind.dark.items()}
        hatched = np.any(list(invalid.values()), axis=0) if invalid else None
        picture = view.draw(label_colors(masks, grid.map_shape), grid_from_ego, hatched)
        panels.append((f"labels: {', '.join(spec.labels)}", picture, key | dict.fromkeys(invalid, HATCH)))
    solid = [kind.name for kind in kinds if kind.is_solid]
    if solid:
        names = ", ".join(solid)
        cells = np.any([masks[name].any(axis=0) for name in solid], axis=0)
        occupied = occupied_at_body_height(volume, grid, inverse_rigid(grid_from_ego))
        shares = [100 * float(occupied[m].mean()) if m.any() else 0.0 for m in (cells, ~cells)]
        title = f"{names} and voxels {BODY_HEIGHT[0]:g}-{BODY_HEIGHT[1]:g} m above ground: they must coincide"
        key = {
            f"both ({shares[0]:.1f} % of the cells of {names})": COINCIDENT,
            f"{names} alone": VEHICLE,
            f"voxel alone ({shares[1]:.1f} % of the other cells)": OCCUPIED_ONLY,
        }
        panels.append((title, view.draw(coincidence_colors(cells, occupied), grid_from_ego), key))
    bottom = top
    for column, (title, picture, key) in enumerate(panels):
        left = MARGIN + column * (TILE_WIDTH + GAP)
        below_title = draw_lines(sheet, left + RULER, top, [title], 17) + 4
        sheet.paste(picture, (left + RULER, below_title))
        view.draw_ticks(sheet, left + RULER, below_title)
        below = draw_key(sheet, left + RULER, below_title + view.height + RULER, TILE_WIDTH - RULER, key)
        bottom = max(bottom, below)
    return bottom

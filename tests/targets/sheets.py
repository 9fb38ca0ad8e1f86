"""Caches with chosen contents, and what a drawn sheet shows, for tests of pictures."""

from __future__ import annotations

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

from occfeat_targets.cache.create import create_cache
from occfeat_targets.cache.geometry import GRID_FROM_EGO_AXES
from occfeat_targets.cache.reader import CacheReader
from tests.conftest import SMALL_GRID, small_identity, small_spec

GREY = (100, 100, 100)


INTRINSICS = np.array([[20, 0, 12], [0, 20, 8], [0, 0, 1]], np.float32)


YAWS = np.deg2rad([60, 0, -60, 120, 180, -120])  # yaws of CAMERAS, measured to the left from the ego's x axis


def cam_from_ego(yaw):
    """A camera at the ego's origin that looks horizontally along `yaw` [rad]."""
    x = (np.sin(yaw), -np.cos(yaw), 0)  # right
    z = (np.cos(yaw), np.sin(yaw), 0)
    matrix = np.eye(4)
    matrix[:3, :3] = [x, (0, 0, -1), z]
    return matrix


def make_cache(tmp_path, occupied=(), *, spec=None, simulated=(), skipped=(), **contents):
    """A cache with grey images, known calibration and the same occupied voxels (z, h, w) in every keyframe."""
    spec = spec or small_spec(teacher=None)
    provenance = {"simulated": list(simulated)}
    cache = create_cache(tmp_path / "train.zarr", spec, small_identity(3), keyframes_per_shard=3, provenance=provenance)
    volume = np.zeros(SMALL_GRID.shape, np.bool_)
    for index in occupied:
        volume[index] = True
    arrays = {a.name: np.zeros((3, *a.shape), a.dtype) for a in spec.arrays()}
    arrays["is_valid"][:] = [i not in skipped for i in range(3)]
    arrays["camera_valid"][:] = True
    arrays["image_area"][:] = (0, 0, *spec.image_size)
    arrays["images"][:] = GREY
    arrays["intrinsics"][:] = INTRINSICS
    arrays["cam_from_ego"][:] = np.resize([cam_from_ego(yaw) for yaw in YAWS], (len(spec.cameras), 4, 4))
    arrays["grid_from_ego"][:] = GRID_FROM_EGO_AXES
    arrays["occupancy"][:] = SMALL_GRID.pack_volume(volume)
    if "vehicles" in spec.labels:
        arrays["labels/vehicles_valid"][:] = 255
    for name, values in contents.items():
        arrays[name][:] = values
    tokens = cache.identity.tokens
    cache.write_shard(0, arrays, {"skipped": {tokens[i]: f"no JPEG for {tokens[i]}" for i in skipped}, "cosine": None})
    return CacheReader(cache)


def pixels(figure):
    """(height, width, 3) int64 colours of the drawn figure."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].astype(np.int64)


def color_at(axes, drawn, points):
    """(n, 3) colours of the drawn figure at points (n, 2) in an axes' own units."""
    x, y = axes.transData.transform(points).T
    return drawn[(len(drawn) - y).astype(int), x.astype(int)]


def views(sheet, name):
    """The pictures of one camera, in the sheet's order."""
    return [
        axes
        for axes in sheet.axes
        if name in [text.get_text() for text in axes.texts] and axes.images and not axes.axison
    ]


def maps(sheet):
    """The bird's-eye pictures."""
    return [axes for axes in sheet.axes if axes.get_xlabel() == "right [m]"]


def texts(sheet):
    return [text.get_text() for text in sheet.findobj(Text) if text.get_text()]


def size(file):
    with Image.open(file) as image:
        return image.size

"""Checks of what users of the Python API pass to it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from occfeat_targets.common.paths import local_path


def checked_path(path: Any, what: str) -> Path:
    """The path, absolute. Raises ValueError unless it is a string or path (a list of paths is none), and if it is a URL."""
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"path is of type {type(path).__name__}: expected {what} as one string or Path")
    return local_path(path)


def check_images(
    images: Tensor, intrinsics: Tensor, cam_from_ego: Tensor, grid_from_ego: Tensor | None, smallest: tuple[int, int]
) -> None:
    """Raises ValueError unless these are arguments of `FeatureNetwork.features`, with images of at least `smallest`."""
    _require_tensors(images=images, intrinsics=intrinsics, cam_from_ego=cam_from_ego)
    if grid_from_ego is not None:
        _require_tensors(grid_from_ego=grid_from_ego)
    if images.dim() != 5 or images.shape[2] != 3:
        raise ValueError(f"images of shape {tuple(images.shape)}: expected (B, V, 3, H, W)")
    batch, views, _, height, width = images.shape
    expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "intrinsics": (intrinsics, (batch, views, 3, 3)),
        "cam_from_ego": (cam_from_ego, (batch, views, 4, 4)),
    }
    if grid_from_ego is not None:
        expected["grid_from_ego"] = (grid_from_ego, (batch, 4, 4))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise ValueError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)} beside images of {tuple(images.shape)}: "
                f"expected float of {shape}"
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds a NaN or an infinity: expected finite numbers")
    if images.is_floating_point():
        low, high = (float(n) for n in images.detach().aminmax())
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # a NaN is neither
            raise ValueError(
                f"float images hold values of {low:g} to {high:g}: expected [0, 1], neither 0 to 255 nor normalised"
            )
    elif images.dtype != torch.uint8:
        raise ValueError(f"images are {images.dtype}: expected uint8, or float in [0, 1]")
    if height < smallest[0] or width < smallest[1]:
        raise ValueError(
            f"images of {height}x{width} would be enlarged to this network's {smallest[0]}x{smallest[1]}, "
            "and enlarged images are not as sharp as real ones: give larger images"
        )


def refuse_samples(refused: NDArray[np.bool_], why: str) -> None:
    """Raise ValueError if any sample of a batch, (B,), is refused."""
    if refused.any():
        raise ValueError(
            f"sample {', '.join(map(str, np.flatnonzero(refused)))} of the batch: {why}: leave it out; "
            'sample["camera_valid"] of a cache shows the masked cameras'
        )


def checked_area(area: Tensor, cam_from_ego: Tensor) -> Tensor:
    """image_area as float64. Raises ValueError unless each camera that is not masked has a part of its image."""
    shape = (*cam_from_ego.shape[:2], 4)
    _require_tensors(image_area=area)
    if area.is_complex() or tuple(area.shape) != shape:
        raise ValueError(
            f"image_area is {area.dtype} of shape {tuple(area.shape)}: expected a tensor (top, left, bottom, right) of {shape}"
        )
    area = area.detach().double()
    if not torch.isfinite(area).all():
        raise ValueError("image_area holds a NaN or an infinity: expected finite numbers")
    is_seen = cam_from_ego.detach().flatten(2).any(-1).to(area.device)
    wrong = area[is_seen & ~(area[..., 2:] > area[..., :2]).all(-1)]
    if len(wrong):
        raise ValueError(
            f"image_area is {wrong[0].tolist()}: expected (top, left, bottom, right), top < bottom, left < right"
        )
    return area


def check_voxels(
    features: Tensor, centers: Tensor, intrinsics: Tensor, cam_from_ego: Tensor, grid_from_ego: Tensor,
    image_size: tuple[int, int], image_area: Tensor | None, cell_size: tuple[float, float, float] | None,
) -> None:  # fmt: skip
    """Raises ValueError unless these are arguments of `voxel_features`; the sampling itself checks the other shapes."""
    _require_tensors(
        features=features,
        centers=centers,
        intrinsics=intrinsics,
        cam_from_ego=cam_from_ego,
        grid_from_ego=grid_from_ego,
    )
    if image_area is not None:
        _require_tensors(image_area=image_area)
    if not features.is_floating_point():
        raise ValueError(f"features are {features.dtype}: expected float, int8 ones multiplied by their scale")
    if features.dim() == 4 and tuple(cam_from_ego.shape) != (len(features), 4, 4):
        raise ValueError(
            f"cam_from_ego of shape {tuple(cam_from_ego.shape)} beside features of {tuple(features.shape)}: expected "
            f"{(len(features), 4, 4)}"
        )
    if tuple(grid_from_ego.shape) != (4, 4):
        raise ValueError(
            f"grid_from_ego of shape {tuple(grid_from_ego.shape)}: expected (4, 4), that of one sample and reference frame"
        )
    if not torch.isfinite(grid_from_ego).all() or not grid_from_ego.any():
        raise ValueError(
            "grid_from_ego is not finite, or all zeros as in the frame of a masked camera, which has no grid: leave the sample out"
        )
    if np.shape(image_size) != (2,):
        raise ValueError(f"image_size={image_size!r}: expected (height, width) [px] of the images of the intrinsics")
    if cell_size is not None and not (np.shape(cell_size) == (3,) and all(0 < n < np.inf for n in cell_size)):
        raise ValueError(f"cell_size={cell_size!r}: expected the grid's (up, forward, right) [m], above 0")


def _require_tensors(**arguments: Any) -> None:
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{name} is of type {type(value).__name__}: expected a torch.Tensor; torch.as_tensor converts a NumPy array"
            )

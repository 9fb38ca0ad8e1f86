"""SimpleBEV's lifting (paper 3.1; Harley et al., "pull"): each voxel's centre is projected into the cameras, the feature
maps are sampled bilinearly there, and the samples are averaged over the views.

Less than a fifth of the (voxel, camera) pairs are in view and a pair has four taps. The volume is therefore computed as a
sparse product of taps and tokens, and no volume per camera is stored. A GPU runs the Triton kernels of `lifting_kernels`;
their gradient uses atomic additions, so its last bits differ between runs. Other devices, and
torch.use_deterministic_algorithms(True), use torch's embedding_bag.

`sampling` documents the position of a feature token in its image. `network` mirrors mirrored images back before the
lifting. `compat="simple-bev"` reproduces the reference code: it stretches the map by w / (w - 1), accepts views up to half
a token outside the image, and fades them out there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.ops.devices import runs_triton
from occfeat_train.ops.views import Views, check_shapes


@torch.compiler.disable  # type: ignore[untyped-decorator]
def lift(features: Tensor, views: Views, grid: VoxelGrid, compat: str | None = None) -> Tensor:
    """Mean over the views of the features sampled at every voxel's centre; zeros without a view.

    features: (B, V, C, h, w); a view is valid if the voxel's centre is in front of the camera and 0 <= u < width,
    0 <= v < height of views.images. Gradients reach the features only.
    Returns (B, Z * C, H, W) of the same dtype, channels_last; channel z * C + c, z = 0 the lowest. Sums are float32, or
    float64 for float64 features.
    Raises ValueError on shapes that do not match, or on a compat other than None and "simple-bev".
    """
    is_exact = features.dtype == torch.float64
    if runs_triton(features.device) and not is_exact and not torch.are_deterministic_algorithms_enabled():
        return lift_triton(features, views, grid, compat)
    return lift_torch(features, views, grid, compat)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def lift_torch(features: Tensor, views: Views, grid: VoxelGrid, compat: str | None = None) -> Tensor:
    """`lift` in plain torch, for any device that has float64."""
    tokens, geometry = _prepared(features, views, grid, compat)
    exact = torch.float64 if features.dtype == torch.float64 else torch.float32
    volumes = [
        _sample_volume(sample.to(exact), _taps(pixels_from_grid, geometry, exact)).to(features.dtype)
        for sample, pixels_from_grid in zip(tokens.unbind(), geometry.pixels_from_grid.unbind(), strict=True)
    ]
    return _as_map(torch.stack(volumes), grid)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def lift_triton(features: Tensor, views: Views, grid: VoxelGrid, compat: str | None = None) -> Tensor:
    """`lift` with the Triton kernels, for a GPU and any floating-point type except float64."""
    tokens, geometry = _prepared(features, views, grid, compat)
    volume: Tensor = _TritonLift.apply(tokens.contiguous(), geometry)
    return _as_map(volume, grid)


@dataclass(frozen=True)
class _Geometry:
    """Everything that determines the taps of a batch."""

    pixels_from_grid: Tensor  # (B, V, 3, 4) float64
    image_size: tuple[int, int]  # height, width [px]
    feature_size: tuple[int, int]  # h, w
    grid: VoxelGrid
    is_compat: bool


@dataclass(frozen=True)
class _Taps:
    """The (voxel, camera) pairs in view, for voxels in order (h, w, z)."""

    starts: Tensor  # (voxels + 1,) index of each voxel's first pair
    tokens: Tensor  # (pairs, 4) index into a sample's V * h * w tokens
    weights: Tensor  # (pairs, 4) bilinear, divided by the voxel's number of views


def check_compat(compat: str | None) -> None:
    if compat not in (None, "simple-bev"):
        raise ValueError(f"compat {compat!r}: expected None or 'simple-bev'")


def _prepared(features: Tensor, views: Views, grid: VoxelGrid, compat: str | None) -> tuple[Tensor, _Geometry]:
    """Tokens (B, V * h * w, C) and their geometry."""
    check_compat(compat)
    check_shapes(features, views)
    h, w = features.shape[-2:]
    if min(h, w) < (2 if compat else 1):
        raise ValueError(f"features of {h}x{w} tokens: expected at least {'2x2 for simple-bev' if compat else '1x1'}")
    pixels_from_grid = (views.intrinsics.double() @ views.cam_from_grid[..., :3, :].double()).detach()
    # the copy from the host to a GPU needs no synchronisation
    pixels_from_grid = pixels_from_grid.to(features.device, non_blocking=pixels_from_grid.device.type == "cpu")
    height, width = views.images.shape[-2:]
    tokens = features.permute(0, 1, 3, 4, 2).flatten(1, 3)
    return tokens, _Geometry(pixels_from_grid, (height, width), (h, w), grid, compat is not None)


def _as_map(volume: Tensor, grid: VoxelGrid) -> Tensor:
    """(B, voxels, C) in order (h, w, z) -> (B, Z * C, H, W)."""
    levels, height, width = grid.shape
    return volume.reshape(len(volume), height, width, levels * volume.shape[-1]).permute(0, 3, 1, 2)


def _sample_volume(tokens: Tensor, taps: _Taps) -> Tensor:
    """One sample's tokens (V * h * w, C) -> (voxels, C)."""
    return nn.functional.embedding_bag(
        taps.tokens.view(-1), tokens, taps.starts * 4, mode="sum", per_sample_weights=taps.weights.view(-1),
        include_last_offset=True,
    )  # fmt: skip


@lru_cache(maxsize=8)
def cell_axes(grid: VoxelGrid) -> tuple[Any, Any, Any]:
    """Cell centres [m] along (up, forward, right): the grid's float32 values as float64."""
    centers = grid.voxel_centers().astype(np.float64)
    up, forward, right = centers[:, 0, 0, 2].copy(), centers[0, :, 0, 1].copy(), centers[0, 0, :, 0].copy()
    return up, forward, right


@lru_cache(maxsize=8)
def _axes_on(grid: VoxelGrid, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """`cell_axes` as tensors."""
    up, forward, right = (torch.from_numpy(axis).to(device) for axis in cell_axes(grid))
    return up, forward, right


class _TritonLift(torch.autograd.Function):
    """Tokens (B, T, C) -> volume (B, H * W * Z, C) of the same type, with `lifting_kernels`. Saves only the geometry for the backward pass."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, geometry: _Geometry) -> Tensor:
        from occfeat_train.ops.lifting_kernels import gather_tokens, scatter_voxels

        batch, _, channels = tokens.shape
        z, h, w = geometry.grid.shape
        volume = torch.empty((batch, h * w * z, channels), dtype=tokens.dtype, device=tokens.device)
        ctx.places = (
            geometry.pixels_from_grid.contiguous(), geometry.image_size, geometry.feature_size, geometry.is_compat,
            _axes_on(geometry.grid, tokens.device),
        )  # fmt: skip
        ctx.scatter, ctx.shape = scatter_voxels, tokens.shape
        gather_tokens(tokens.detach(), *ctx.places, volume.view(batch, h, w, z, channels))  # type: ignore[call-arg]  # mypy counts a starred argument as many
        return volume

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        z, h, w = map(len, ctx.places[4])
        out = torch.zeros(ctx.shape, dtype=torch.float32, device=grad.device)
        ctx.scatter(grad.contiguous().unflatten(1, (h, w, z)), *ctx.places, out)
        return out.to(grad.dtype), None


def _taps(pixels_from_grid: Tensor, geometry: _Geometry, dtype: torch.dtype) -> _Taps:
    """The taps of one sample. The kernels do all operations in the same order."""
    device = pixels_from_grid.device
    (height, width), (h, w) = geometry.image_size, geometry.feature_size
    up, forward, right = _axes_on(geometry.grid, device)
    x, y, z = right[:, None, None], forward[:, None, None, None], up[:, None]  # to (H, W, Z, V)
    u, v, depth = (row[:, 0] * x + row[:, 1] * y + row[:, 2] * z + row[:, 3] for row in pixels_from_grid.unbind(1))
    if geometry.is_compat:
        clamped = depth.clamp(min=1e-6)
        u, v = u / clamped * (w / width), v / clamped * (h / height)
        is_valid = (depth > 0) & (u > -0.5) & (u < w - 0.5) & (v > -0.5) & (v < h - 0.5)
        u, v = u * (w / (w - 1)) - 0.5, v * (h / (h - 1)) - 0.5
        is_valid &= (u > -1) & (u < w) & (v > -1) & (v < h)
    else:
        u, v = u / depth, v / depth
        is_valid = (depth > 0) & (u >= 0) & (u < width) & (v >= 0) & (v < height)
        u, v = (u * (w / width) - 0.5).clamp(0, w - 1), (v * (h / height) - 0.5).clamp(0, h - 1)
    is_valid = is_valid.flatten(0, 2)  # (voxels, V)
    num_views = is_valid.sum(1)
    voxel, cam = is_valid.nonzero(as_tuple=True)
    u, v = u.reshape(is_valid.shape)[voxel, cam], v.reshape(is_valid.shape)[voxel, cam]
    x0, y0 = u.floor().long(), v.floor().long()
    column, row = torch.stack([x0, x0 + 1], 1), torch.stack([y0, y0 + 1], 1)
    right_weight, lower_weight = (u - x0).to(dtype), (v - y0).to(dtype)
    across = torch.stack([1 - right_weight, right_weight], 1) * ((column >= 0) & (column < w))
    down = torch.stack([1 - lower_weight, lower_weight], 1) * ((row >= 0) & (row < h))
    views = num_views[voxel].double()
    down *= (1 / (views + 1e-6 if geometry.is_compat else views)).to(dtype)[:, None]
    tokens = ((cam * h)[:, None] + row.clamp(0, h - 1))[:, :, None] * w + column.clamp(0, w - 1)[:, None, :]
    starts = nn.functional.pad(num_views.cumsum(0), (1, 0))
    return _Taps(starts, tokens.flatten(1), (down[:, :, None] * across[:, None, :]).flatten(1))

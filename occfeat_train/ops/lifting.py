"""Image features to a bird's-eye map, SimpleBEV's way (paper 3.1; Harley et al., "pull"): every voxel takes the mean,
over the views its centre projects into, of the bilinearly sampled feature maps. Stands between the image encoder and
the decoder; `SimpleBEV` and `lift` are what the rest of the package calls.

Of the (voxel, camera) pairs under a fifth are in view, and a pair is four taps, so that the volume is a sparse product
of taps and tokens: no camera's volume is ever formed. On a CPU the compiled kernels of `gather` do it, on torch's
number of threads; on a GPU the Triton kernels of `lifting_kernels`; elsewhere torch's embedding_bag.

A gradient has the same bits in every run, whatever the threads. Not so Triton's, whose additions come in any order: under
torch.use_deterministic_algorithms(True) embedding_bag takes its place.

Where a feature token lies in its image is said in `sampling`; mirrored images are turned back before, see `network`.
`compat="simple-bev"` reproduces the reference code instead: it stretches the map by w / (w - 1), takes views up to half
a token outside the image, and fades them out there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.ops.devices import runs_triton
from occfeat_train.ops.gather import find_taps, gather, scatter
from occfeat_train.ops.norms import InstanceNorm
from occfeat_train.ops.threads import in_threads
from occfeat_train.ops.views import Views, check_shapes

_SLABS = 16  # a sample's volume is worked on in so many


class SimpleBEV(nn.Module):
    """Lifting and the compressor of its Z * C channels to C: a 3x3 convolution, InstanceNorm, GELU."""

    mirrors_grid = True  # with its grid mirrored, it gives the mirrored volume: see `network`

    def __init__(self, grid: VoxelGrid, channels: int, compat: str | None = None) -> None:
        """channels: C of the image features and of the result. compat: None or "simple-bev"."""
        super().__init__()
        check_compat(compat)
        self.grid, self.compat, self.feature_channels = grid, compat, channels
        self.compressor = nn.Sequential(
            nn.Conv2d(grid.shape[0] * channels, channels, 3, padding=1, bias=False), InstanceNorm(), nn.GELU()
        )

    def lift(self, features: Tensor, views: Views) -> Tensor:
        """(B, S, C, h, w) -> (B, Z * C, H, W): `lift` on this module's grid."""
        return lift(features, views, self.grid, self.compat)

    def forward(self, features: Tensor, views: Views) -> Tensor:
        """(B, S, C, h, w) -> (B, C, H, W)."""
        compressed: Tensor = self.compressor(self.lift(features, views))
        return compressed


@torch.compiler.disable  # type: ignore[untyped-decorator]
def lift(features: Tensor, views: Views, grid: VoxelGrid, compat: str | None = None) -> Tensor:
    """Mean over the views of the features sampled at every voxel's centre; zeros where there is no view.

    features: (B, S, C, h, w); a view is valid if the voxel's centre is in front of the camera and 0 <= u < width,
    0 <= v < height of views.images. Gradients reach the features only.
    Returns (B, Z * C, H, W) of the same dtype, channels_last; channel z * C + c, z = 0 the lowest. Sums are float32.
    Raises ValueError on shapes that don't fit or another compat than None and "simple-bev".
    """
    if features.dtype == torch.float64:
        return lift_torch(features, views, grid, compat)
    if runs_triton(features.device) and not torch.are_deterministic_algorithms_enabled():
        return lift_triton(features, views, grid, compat)
    if features.device.type == "cpu":
        return _lift(_GatherNumba, features, views, grid, compat)
    return lift_torch(features, views, grid, compat)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def lift_triton(features: Tensor, views: Views, grid: VoxelGrid, compat: str | None = None) -> Tensor:
    """`lift` by Triton's kernels, for a GPU and any float but float64; a gradient's last bits change from run to run."""
    return _lift(_GatherTriton, features, views, grid, compat)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def lift_torch(features: Tensor, views: Views, grid: VoxelGrid, compat: str | None = None) -> Tensor:
    """`lift` in plain torch, for any device that has float64; float64 features are summed in float64."""
    return _lift(_GatherTorch, features, views, grid, compat)


@dataclass(frozen=True)
class _Geometry:
    """All that the taps of a batch depend on."""

    pixels_from_grid: Tensor  # (B, S, 3, 4) float64
    image_size: tuple[int, int]  # height, width [px]
    feature_size: tuple[int, int]  # h, w
    grid: VoxelGrid
    is_compat: bool


@dataclass(frozen=True)
class _Taps:
    """Of voxels in order (h, w, z), the list of (voxel, camera) pairs in view. Arrays or tensors."""

    starts: Any  # (voxels + 1,) where each voxel's pairs start
    tokens: Any  # (pairs, 4) index of a sample's S * h * w tokens
    weights: Any  # (pairs, 4) bilinear, divided by the voxel's number of views


def check_compat(compat: str | None) -> None:
    if compat not in (None, "simple-bev"):
        raise ValueError(f"compat {compat!r}: expected None or 'simple-bev'")


def _lift(function: type[Any], features: Tensor, views: Views, grid: VoxelGrid, compat: str | None) -> Tensor:
    check_compat(compat)
    check_shapes(features, views)
    batch, cams, channels, h, w = features.shape
    if min(h, w) < (2 if compat else 1):
        raise ValueError(f"features of {h}x{w} tokens: expected at least {'2x2 for simple-bev' if compat else '1x1'}")
    pixels_from_grid = (views.intrinsics.double() @ views.cam_from_grid[..., :3, :].double()).detach()
    # from the host, a GPU's copy need not be waited for
    pixels_from_grid = pixels_from_grid.to(features.device, non_blocking=pixels_from_grid.device.type == "cpu")
    height, width = views.images.shape[-2:]
    geometry = _Geometry(pixels_from_grid, (height, width), (h, w), grid, compat is not None)
    tokens = features.permute(0, 1, 3, 4, 2).reshape(batch, cams * h * w, channels)
    if function is not _GatherTriton and tokens.dtype != torch.float64:  # its kernels convert what they read
        tokens = tokens.float()
    volume: Tensor = function.apply(tokens.contiguous(), geometry, features.dtype)
    return volume.flatten(3).permute(0, 3, 1, 2)


# -- compiled ---------------------------------------------------------------------------------------------------------


class _GatherNumba(torch.autograd.Function):
    """Tokens (B, T, C) float32 -> volume (B, H, W, Z, C) of some dtype, by the kernels of `gather`."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, geometry: _Geometry, dtype: torch.dtype) -> Tensor:
        batch, _, channels = tokens.shape
        z, h, w = geometry.grid.shape
        native = dtype if dtype in (torch.float32, torch.bfloat16) else torch.float32
        volume = torch.empty((batch, h, w, z, channels), dtype=native)
        source, target = tokens.detach().numpy(), _rows(volume)
        matrices = geometry.pixels_from_grid.numpy()
        slabs = [(b, slab) for b in range(batch) for slab in _slabs(h)]
        is_needed = ctx.needs_input_grad[0]

        def work(task: tuple[int, slice]) -> _Taps | None:
            sample, slab = task
            taps = _taps_numpy(matrices[sample], geometry, slab)
            rows = target[sample, slab.start * w * z : slab.stop * w * z]
            gather(source[sample], taps.starts, taps.tokens, taps.weights, rows)
            return taps if is_needed else None

        ctx.taps = list(zip(slabs, in_threads(work, slabs), strict=True))
        ctx.shape = tokens.shape
        ctx.cams = matrices.shape[1]
        return volume.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """A camera's tokens belong to one task, which adds to them in voxel order."""
        if grad.dtype not in (torch.float32, torch.bfloat16):
            grad = grad.float()
        source, row_voxels = _rows(grad.contiguous()), grad.shape[2] * grad.shape[3]
        out = torch.zeros(ctx.shape, dtype=torch.float32)
        target, per_cam = out.numpy(), ctx.shape[1] // ctx.cams

        def work(task: tuple[int, int]) -> None:
            sample, cam = task
            owned = (cam * per_cam, (cam + 1) * per_cam)
            for (b, slab), taps in ctx.taps:
                if b == sample:
                    rows = source[b, slab.start * row_voxels : slab.stop * row_voxels]
                    scatter(rows, taps.starts, taps.tokens, taps.weights, owned, target[b])

        list(in_threads(work, [(b, cam) for b in range(len(out)) for cam in range(ctx.cams)]))
        return out, None, None


def _rows(volume: Tensor) -> Any:
    """(B, H, W, Z, C) -> (B, voxels, C) array over the same memory; bfloat16 as its int16 bits."""
    rows = volume.detach().flatten(1, 3)
    return (rows.view(torch.int16) if rows.dtype == torch.bfloat16 else rows).numpy()


def _slabs(rows: int) -> Iterator[slice]:
    size = -(-rows // _SLABS)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def _taps_numpy(pixels_from_grid: Any, geometry: _Geometry, slab: slice) -> _Taps:
    up, forward, right = cell_axes(geometry.grid)
    forward = forward[slab]
    voxels, cams = forward.size * right.size * up.size, len(pixels_from_grid)
    starts = np.empty(voxels + 1, np.int32)
    tokens, weights = np.empty((voxels * cams, 4), np.int32), np.empty((voxels * cams, 4), np.float32)
    height, width = geometry.image_size
    pairs = find_taps(
        pixels_from_grid, (float(height), float(width)), geometry.feature_size, geometry.is_compat,
        (up, forward, right), starts, tokens, weights,
    )  # fmt: skip
    return _Taps(starts, tokens[:pairs].copy(), weights[:pairs].copy())


@lru_cache(maxsize=8)
def cell_axes(grid: VoxelGrid) -> tuple[Any, Any, Any]:
    """Cell centres [m] along (up, forward, right), as float64 of the grid's float32."""
    centers = grid.voxel_centers().astype(np.float64)
    up, forward, right = centers[:, 0, 0, 2].copy(), centers[0, :, 0, 1].copy(), centers[0, 0, :, 0].copy()
    return up, forward, right


@lru_cache(maxsize=8)
def _axes_on(grid: VoxelGrid, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """`cell_axes` as tensors."""
    up, forward, right = (torch.from_numpy(axis).to(device) for axis in cell_axes(grid))
    return up, forward, right


# -- Triton -----------------------------------------------------------------------------------------------------------


class _GatherTriton(torch.autograd.Function):
    """Tokens (B, T, C) -> volume (B, H, W, Z, C) of some dtype, by `lifting_kernels`. Nothing is kept for the gradient."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, geometry: _Geometry, dtype: torch.dtype) -> Tensor:
        from occfeat_train.ops.lifting_kernels import gather_tokens, scatter_voxels

        batch, _, channels = tokens.shape
        z, h, w = geometry.grid.shape
        volume = torch.empty((batch, h, w, z, channels), dtype=dtype, device=tokens.device)
        ctx.places = (
            geometry.pixels_from_grid.contiguous(), geometry.image_size, geometry.feature_size, geometry.is_compat,
            _axes_on(geometry.grid, tokens.device),
        )  # fmt: skip
        ctx.scatter, ctx.shape, ctx.dtype = scatter_voxels, tokens.shape, tokens.dtype
        gather_tokens(tokens.detach(), *ctx.places, volume)  # type: ignore[call-arg]  # mypy counts a starred argument as many
        return volume

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        out = torch.zeros(ctx.shape, dtype=torch.float32, device=grad.device)
        ctx.scatter(grad.contiguous(), *ctx.places, out)
        return out.to(ctx.dtype), None, None


# -- plain torch ------------------------------------------------------------------------------------------------------


class _GatherTorch(torch.autograd.Function):
    """Tokens (B, T, C) float32 or float64 -> volume (B, H, W, Z, C) of some dtype, a sample at a time."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, geometry: _Geometry, dtype: torch.dtype) -> Tensor:
        batch, _, channels = tokens.shape
        z, h, w = geometry.grid.shape
        volume = torch.empty((batch, h * w * z, channels), dtype=dtype, device=tokens.device)
        ctx.taps, ctx.shape, ctx.dtype = [], tokens.shape, tokens.dtype
        for sample in range(batch):
            taps = _taps_torch(geometry.pixels_from_grid[sample], geometry, tokens.dtype)
            volume[sample] = _weighted_sums(tokens[sample], taps.tokens.view(-1), taps.starts * 4, taps.weights)
            if ctx.needs_input_grad[0]:
                ctx.taps.append(taps)
        return volume.view(batch, h, w, z, channels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """The transposed product is a weighted sum of voxels for every token: no atomic additions."""
        rows = grad.flatten(1, 3)
        out = torch.empty(ctx.shape, dtype=ctx.dtype, device=grad.device)
        each_token = torch.arange(ctx.shape[1] + 1, device=grad.device)
        for sample, taps in enumerate(ctx.taps):
            tokens, order = taps.tokens.view(-1).sort(stable=True)
            every_voxel = torch.arange(rows.shape[1], device=grad.device)
            voxels = every_voxel.repeat_interleave(taps.starts.diff(), output_size=len(taps.tokens))
            starts = torch.searchsorted(tokens, each_token)
            weights = taps.weights.view(-1)[order]
            out[sample] = _weighted_sums(rows[sample].to(ctx.dtype), voxels[order // 4], starts, weights)
        return out, None, None


def _weighted_sums(rows: Tensor, index: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    return nn.functional.embedding_bag(
        index, rows, starts, mode="sum", per_sample_weights=weights.view(-1), include_last_offset=True
    )


def _taps_torch(pixels_from_grid: Tensor, geometry: _Geometry, dtype: torch.dtype) -> _Taps:
    """One sample's. Every operation is `gather.find_taps`'s, in its order."""
    device = pixels_from_grid.device
    (height, width), (h, w) = geometry.image_size, geometry.feature_size
    up, forward, right = _axes_on(geometry.grid, device)
    x, y, z = right[:, None, None], forward[:, None, None, None], up[:, None]  # to (H, W, Z, S)
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
    is_valid = is_valid.flatten(0, 2)  # (voxels, S)
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

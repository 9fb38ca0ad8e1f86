"""Mean over the views of bilinear samples: each point is projected into the cameras, the feature maps of those that see it
are sampled there, and the samples are averaged.

SimpleBEV's lifting (paper 3.1; Harley et al., "pull") does this at every voxel's centre, with the student's features. The
targets of the distillation (paper 3.3) do it at occupied voxels, with the teacher's. `views` defines which camera sees a
point, and where on its map.

A point is in view of few cameras, and a (point, camera) pair has four taps. The mean is therefore computed as a sparse
product of taps and tokens, and no samples per camera are stored. Three implementations: plain torch on any device; the
Triton kernels of `mean_over_views_triton` for the lifting on a GPU, whose gradient uses atomic additions, so that its last
bits differ between runs; and the numba kernel of `mean_over_views_numba` for targets in the loader's threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.ops.devices import runs_triton
from occfeat_train.ops.mean_over_views_numba import mean_over_views
from occfeat_train.ops.occlusion import hidden_voxels
from occfeat_train.ops.views import Cameras, Views, check_arguments, check_shapes


@lru_cache(maxsize=8)
def voxel_axes(
    grid: VoxelGrid, device: torch.device
) -> tuple[Float[Tensor, " Z"], Float[Tensor, " H"], Float[Tensor, " W"]]:
    """Voxel centres [m] along (up, forward, right): the grid's float32 values as float64."""
    centers = torch.from_numpy(grid.voxel_centers()).double()
    up, forward, right = (
        axis.clone().to(device) for axis in (centers[:, 0, 0, 2], centers[0, :, 0, 1], centers[0, 0, :, 0])
    )
    return up, forward, right


def every_voxel(
    grid: VoxelGrid, device: torch.device
) -> tuple[Float[Tensor, "W 1 1"], Float[Tensor, "H 1 1 1"], Float[Tensor, "Z 1"]]:
    """x, y, z [m] of all voxel centres, as `Cameras.project` takes them; they broadcast to (H, W, Z, 1)."""
    up, forward, right = voxel_axes(grid, device)
    return right[:, None, None], forward[:, None, None, None], up[:, None]


# -- lifting: every voxel ---------------------------------------------------------------------------------------------


@torch.compiler.disable  # type: ignore[untyped-decorator]
def lift(features: Float[Tensor, "B V C h w"], views: Views, grid: VoxelGrid) -> Float[Tensor, "B ZC H W"]:
    """Mean over the views of the features sampled at every voxel's centre; zeros without a view.

    Gradients reach the features only.
    Returns a map of the same dtype, channels_last; channel z * C + c of Z * C, z = 0 the lowest. Sums are float32, or
    float64 for float64 features.
    Raises ValueError on shapes that do not match.
    """
    is_exact = features.dtype == torch.float64
    if runs_triton(features.device) and not is_exact and not torch.are_deterministic_algorithms_enabled():
        return lift_triton(features, views, grid)
    return lift_torch(features, views, grid)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def lift_torch(features: Float[Tensor, "B V C h w"], views: Views, grid: VoxelGrid) -> Float[Tensor, "B ZC H W"]:
    """`lift` in plain torch, for any device that has float64."""
    check_shapes(features, views)
    exact, feature_size = _exact(features.dtype), (features.shape[3], features.shape[4])
    cameras, points = views.cameras.to(features.device), every_voxel(grid, features.device)
    volumes = [
        sum_taps(tokens.to(exact), find_taps(cameras[sample], points, feature_size, exact)).to(features.dtype)
        for sample, tokens in enumerate(to_tokens(features).unbind())
    ]
    return to_map(torch.stack(volumes), grid)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def lift_triton(features: Float[Tensor, "B V C h w"], views: Views, grid: VoxelGrid) -> Float[Tensor, "B ZC H W"]:
    """`lift` with the Triton kernels, for a GPU and any floating-point type except float64."""
    check_shapes(features, views)
    feature_size = features.shape[3], features.shape[4]
    cameras = views.cameras.to(features.device)
    geometry = cameras.packed(feature_size), cameras.image_size, feature_size, voxel_axes(grid, features.device)
    volume: Tensor = _TritonLift.apply(to_tokens(features).contiguous(), geometry)
    return to_map(volume, grid)


def to_tokens(features: Float[Tensor, "B V C h w"]) -> Float[Tensor, "B V*h*w C"]:
    """Channels last."""
    return features.permute(0, 1, 3, 4, 2).flatten(1, 3)


def to_map(volume: Float[Tensor, "B voxels C"], grid: VoxelGrid) -> Float[Tensor, "B ZC H W"]:
    """volume: in order (h, w, z)."""
    levels, height, width = grid.shape
    return volume.reshape(len(volume), height, width, levels * volume.shape[-1]).permute(0, 3, 1, 2)


class _TritonLift(torch.autograd.Function):
    """Tokens (B, T, C) -> volume (B, H * W * Z, C) of the same type. Saves only the geometry for the backward pass."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, geometry: tuple[Any, ...]) -> Tensor:
        from occfeat_train.ops.mean_over_views_triton import run_kernel

        ctx.geometry, ctx.kernel, ctx.tokens = geometry, run_kernel, tokens.shape
        z, h, w = map(len, geometry[-1])
        volume = tokens.new_empty((len(tokens), h, w, z, tokens.shape[-1]))
        ctx.kernel(tokens.detach(), *geometry, volume, False)
        return volume.flatten(1, 3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        z, h, w = map(len, ctx.geometry[-1])
        out = torch.zeros(ctx.tokens, dtype=torch.float32, device=grad.device)
        ctx.kernel(out, *ctx.geometry, grad.contiguous().unflatten(1, (h, w, z)), True)
        return out.to(grad.dtype), None


# -- taps -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Taps:
    """Bilinear samples of n points in V maps: the (point, camera) pairs in view, sorted by point.

    starts: index of each of n points' first pair, and the number of pairs. tokens: index into V * h * w tokens.
    """

    starts: Int[Tensor, " n_plus_1"]
    tokens: Int[Tensor, "pairs 4"]
    weights: Float[Tensor, "pairs 4"]


def bilinear_taps(
    column: Float[Tensor, "*n"], row: Float[Tensor, "*n"], feature_size: tuple[int, int], weight: Float[Tensor, "*n"]
) -> tuple[Int[Tensor, "*n 4"], Float[Tensor, "*n 4"]]:
    """The four tokens around positions [tokens] of an h x w map, as indices, and their weights.

    weight: factor of a position's four weights, which have its dtype. Tokens outside the map have weight 0. Gradients reach
    column, row and weight.
    """
    h, w = feature_size
    x0, y0 = column.detach().floor(), row.detach().floor()
    right, lower = (column - x0).to(weight.dtype), (row - y0).to(weight.dtype)
    columns, rows = torch.stack([x0, x0 + 1], -1), torch.stack([y0, y0 + 1], -1)
    across = torch.stack([1 - right, right], -1) * ((columns >= 0) & (columns < w))
    down = torch.stack([1 - lower, lower], -1) * ((rows >= 0) & (rows < h)) * weight[..., None]
    columns, rows = columns.clamp(0, w - 1).long(), rows.clamp(0, h - 1).long()
    tokens = rows[..., :, None] * w + columns[..., None, :]
    return tokens.flatten(-2), (down[..., :, None] * across[..., None, :]).flatten(-2)


def find_taps(
    cameras: Cameras,
    points: tuple[Tensor, Tensor, Tensor],
    feature_size: tuple[int, int],
    dtype: torch.dtype,
    hidden: Bool[Tensor, "*points V"] | None = None,
) -> Taps:
    """Taps whose sum is the mean over the views. points: as `Cameras.project` takes them. dtype: of the weights.

    hidden: points that a camera does not see although they are inside its image.
    """
    u, v, _, is_seen = cameras.project(*points)
    if hidden is not None:
        is_seen = is_seen & ~hidden
    column, row = cameras.to_tokens_in_view(u, v, feature_size)
    return taps_of(column, row, is_seen, 1 / is_seen.sum(-1).flatten().double(), feature_size, dtype)


def taps_of(
    column: Float[Tensor, "*points V"],
    row: Float[Tensor, "*points V"],
    is_seen: Bool[Tensor, "*points V"],
    share: Float[Tensor, " n"],
    feature_size: tuple[int, int],
    dtype: torch.dtype,
) -> Taps:
    """column, row: where each camera sees each of n points. share: weight of one view of a point."""
    is_seen = is_seen.flatten(0, -2)  # (n, V)
    point, cam = is_seen.nonzero(as_tuple=True)
    column, row = (t.flatten(0, -2)[point, cam] for t in (column, row))
    tokens, weights = bilinear_taps(column, row, feature_size, share[point].to(dtype))
    tokens += (cam * (feature_size[0] * feature_size[1]))[:, None]
    return Taps(nn.functional.pad(is_seen.sum(1).cumsum(0), (1, 0)), tokens, weights)


def sum_taps(tokens: Float[Tensor, "T C"], taps: Taps) -> Float[Tensor, "n C"]:
    """Weighted sums at n points."""
    return nn.functional.embedding_bag(
        taps.tokens.view(-1), tokens, taps.starts * 4, mode="sum", per_sample_weights=taps.weights.view(-1),
        include_last_offset=True,
    )  # fmt: skip


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# -- given points -----------------------------------------------------------------------------------------------------


def sample_voxel_features(
    features: Float[Tensor, "V h w C"],
    cam_from_grid: Float[Tensor, "V 4 4"],
    intrinsics: Float[Tensor, "V 3 3"],
    image_size: tuple[int, int],
    centers: Float[Tensor, "n 3"],
    area: Shaped[Tensor, "V 4"] | None = None,
    cell_size: tuple[float, float, float] | None = None,
) -> tuple[Float[Tensor, "n C"], UInt8[Tensor, " n"]]:
    """Mean over the views of one sample's features at given points, on any device; zeros without a view.

    cam_from_grid: cam_from_ego @ inverse(grid_from_ego) [m]; zeros for a masked camera.
    intrinsics: of an image of image_size, (height, width) [px].
    centers: points (right, forward, up) in the grid [m].
    area: (top, left, bottom, right) [px] of the part of each image that shows the scene; None for whole images.
    cell_size: (up, forward, right) [m]. If given, the points are the centres of such voxels, and a view does not see those that
    others of them hide (`ops.occlusion`). None: no depth test, as in the paper.

    Returns float32, or float64 for float64 features, and the number of views. Gradients reach the features.
    Raises ValueError on shapes that don't fit.
    """
    check_arguments(features, None, cam_from_grid, intrinsics, centers, area)
    x, y, z = centers.to(features.device, torch.float64)[..., None].unbind(1)
    cameras = Cameras.of(intrinsics.detach(), cam_from_grid.detach(), image_size, area).to(features.device)
    exact, hidden = _exact(features.dtype), None
    if cell_size is not None:
        found = hidden_voxels(centers.detach().cpu().numpy(), cell_size, cameras.to(torch.device("cpu")))
        hidden = torch.from_numpy(found.T).to(features.device)
    taps = find_taps(cameras, (x, y, z), (features.shape[1], features.shape[2]), exact, hidden)
    return sum_taps(features.to(exact).flatten(0, 2), taps), taps.starts.diff().to(torch.uint8)


def sample_voxel_features_numpy(
    features: Shaped[NDArray[Any], "V h w C"],
    feature_scale: Float[NDArray[Any], "V h w"] | None,
    cam_from_grid: Float[NDArray[Any], "V 4 4"],
    intrinsics: Float[NDArray[Any], "V 3 3"],
    image_size: tuple[int, int],
    centers: Float[NDArray[Any], "n 3"],
    *,
    area: Shaped[NDArray[Any], "V 4"] | None = None,
    cell_size: tuple[float, float, float] | None = None,
    dtype: Literal["float16", "float32"] = "float16",
) -> tuple[Float[NDArray[Any], "n C"], UInt8[NDArray[Any], " n"]]:
    """`sample_voxel_features` on NumPy arrays with a numba kernel, for the teacher's features (paper 3.3).

    features: float16 or float32; or int8, with
    feature_scale: float16, the factor of each token's int8 values; None otherwise.
    cell_size: see `sample_voxel_features`.
    dtype: of the result. Arithmetic is float32, the projection float64.

    A NaN or infinity in one of the four tokens around a projection propagates to the channel.
    """
    check_arguments(features, feature_scale, cam_from_grid, intrinsics, centers, area)
    views, h, w, channels = features.shape
    if features.dtype not in (np.float16, np.float32, np.int8):
        raise ValueError(f"features are {features.dtype}: expected float16, float32, or int8 with feature_scale")
    maps = np.ascontiguousarray(features).reshape(views, h * w, channels)
    if maps.dtype == np.float16:
        maps = torch.from_numpy(maps).float().numpy()  # several times faster than NumPy
    scale = None
    if feature_scale is not None:
        scale = np.ascontiguousarray(feature_scale, np.float32).reshape(views, h * w)
    matrices = torch.from_numpy(intrinsics.astype(np.float64) @ cam_from_grid[..., :3, :].astype(np.float64))
    cameras = Cameras.from_matrices(matrices, image_size, None if area is None else torch.from_numpy(area))
    hidden = None if cell_size is None else hidden_voxels(centers, cell_size, cameras)
    out, num_views = np.empty((len(centers), channels), np.float32), np.empty(len(centers), np.uint8)
    mean_over_views(maps, scale, (h, w), cameras.packed((h, w)).numpy(), (float(image_size[0]), float(image_size[1])),
            np.ascontiguousarray(centers, np.float32), hidden, out, num_views)  # fmt: skip
    return out if dtype == "float32" else torch.from_numpy(out).half().numpy(), num_views

"""Target features Y_v of occupied voxels (paper 3.3): each voxel's centre is projected into the cameras, the teacher's
feature maps are sampled bilinearly there, and the samples are averaged over the views.

Feature maps are channels-last, [cams, h, w, C], so that the channels of a token are contiguous. The centre of token
(row i, column j) is at ((j + 0.5) * W / w, (i + 0.5) * H / h) pixels of a W x H image. Beyond the outermost centres the
border token is used. This equals `grid_sample(align_corners=False, padding_mode="border")`: a valid projection is never
attenuated.
"""

from __future__ import annotations

from typing import Any, Literal

import numba
import numpy as np
import torch
from numpy.typing import NDArray

_BLOCK = 256  # voxels projected at a time

Precision = Literal["float16", "float32"]


def sample_voxel_features(
    features: torch.Tensor,
    feature_scale: torch.Tensor | None,
    cam_from_grid: torch.Tensor,
    intrinsics: torch.Tensor,
    image_size: tuple[int, int],
    centers: torch.Tensor,
    batch_index: torch.Tensor | None = None,
    *,
    dtype: Precision = "float16",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean over the views of the bilinearly sampled teacher features at voxel centres (paper 3.3).

    Shapes are those of one sample. For a batch, every tensor except `centers` has a leading batch axis, and `batch_index`
    is required.
    features: (cams, h, w, C) float16 or float32; or int8, with
    feature_scale: (cams, h, w) float16, the factor of each token's int8 values; None otherwise.
    cam_from_grid: (cams, 4, 4), that is cam_from_ego @ inverse(grid_from_ego) [m].
    intrinsics: (cams, 3, 3) of an image of
    image_size: (height, width) pixels; a projection must be inside this image.
    centers: (n, 3) voxel centres (right, forward, up) in the grid [m], of all samples.
    batch_index: (n,) index of each voxel's sample, never decreasing, as `nonzero` returns it.
    dtype: of the result. Arithmetic is float32, the projection float64.

    Returns features (n, C) and num_views (n,) uint8, on the device of `features`. A voxel that no camera sees has
    num_views 0 and zeros. A NaN or infinity in one of the four tokens around a projection propagates to the channel.
    A CPU uses `sample_voxel_features_numpy`. Other devices use plain torch, which reads only valid (voxel, camera) pairs.
    Raises ValueError on shapes that don't fit.
    """
    if features.device.type == "cpu":
        tensors = (features, feature_scale, cam_from_grid, intrinsics, centers, batch_index)
        arrays: list[Any] = [t if t is None else t.detach().numpy() for t in tensors]
        maps, scale, cam, pinhole, points, index = arrays
        sampled, views = sample_voxel_features_numpy(maps, scale, cam, pinhole, image_size, points, index, dtype=dtype)
        return torch.from_numpy(sampled), torch.from_numpy(views)
    return sample_voxel_features_torch(
        features, feature_scale, cam_from_grid, intrinsics, image_size, centers, batch_index, dtype=dtype
    )


def sample_voxel_features_torch(
    features: torch.Tensor,
    feature_scale: torch.Tensor | None,
    cam_from_grid: torch.Tensor,
    intrinsics: torch.Tensor,
    image_size: tuple[int, int],
    centers: torch.Tensor,
    batch_index: torch.Tensor | None = None,
    *,
    dtype: Precision = "float16",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sample_voxel_features` in plain torch, for any device."""
    _check_shapes(features, feature_scale, cam_from_grid, intrinsics, centers, batch_index)
    cams, h, w, channels = features.shape[-4:]
    height, width = image_size
    pixels_from_grid = (intrinsics.double() @ cam_from_grid[..., :3, :].double()).reshape(-1, cams, 3, 4)
    sample = torch.zeros(len(centers), dtype=torch.int64, device=features.device)
    if batch_index is not None:
        sample = batch_index.long()
    projection = pixels_from_grid[sample]  # (n, cams, 3, 4)
    u, v, depth = (projection[..., :3] @ centers.double()[:, None, :, None] + projection[..., 3:])[..., 0].unbind(-1)
    u, v = u / depth, v / depth
    is_valid = (depth > 0) & (u >= 0) & (u < width) & (v >= 0) & (v < height)
    num_views = is_valid.sum(1)

    voxel, cam = is_valid.nonzero(as_tuple=True)
    x = (u[voxel, cam] * (w / width) - 0.5).clamp(0, w - 1)
    y = (v[voxel, cam] * (h / height) - 0.5).clamp(0, h - 1)
    x0, y0 = x.long(), y.long()
    right, lower = (x - x0).float(), (y - y0).float()
    map_start = (sample[voxel] * cams + cam) * h
    tokens = features.reshape(-1, channels)
    rows = torch.zeros(len(voxel), channels, device=features.device)
    for row, row_weight in ((y0, 1 - lower), ((y0 + 1).clamp(max=h - 1), lower)):
        for column, column_weight in ((x0, 1 - right), ((x0 + 1).clamp(max=w - 1), right)):
            token = (map_start + row) * w + column
            weight = row_weight * column_weight / num_views[voxel]
            if feature_scale is not None:
                weight = weight * feature_scale.reshape(-1)[token].float()
            rows += tokens[token].float() * weight[:, None]
    sampled = torch.zeros(len(centers), channels, device=features.device).index_add_(0, voxel, rows)
    return sampled.to(getattr(torch, dtype)), num_views.to(torch.uint8)


def sample_voxel_features_numpy(
    features: NDArray[Any],
    feature_scale: NDArray[np.float16] | None,
    cam_from_grid: NDArray[Any],
    intrinsics: NDArray[Any],
    image_size: tuple[int, int],
    centers: NDArray[Any],
    batch_index: NDArray[np.integer[Any]] | None = None,
    *,
    dtype: Precision = "float16",
) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    """`sample_voxel_features` on NumPy arrays, with a numba kernel that releases the GIL."""
    _check_shapes(features, feature_scale, cam_from_grid, intrinsics, centers, batch_index)
    cams, h, w, channels = features.shape[-4:]
    if features.dtype not in (np.float16, np.float32, np.int8):
        raise ValueError(f"features are {features.dtype}: expected float16, float32, or int8 with feature_scale")
    maps = np.ascontiguousarray(features).reshape(-1, cams, h, w, channels)
    if maps.dtype == np.float16:
        maps = torch.from_numpy(maps).float().numpy()  # several times faster than NumPy
    scale = None
    if feature_scale is not None:
        scale = np.ascontiguousarray(feature_scale, np.float32).reshape(-1, cams, h, w)
    pixels_from_grid = intrinsics.astype(np.float64) @ cam_from_grid[..., :3, :].astype(np.float64)
    pixels_from_grid = pixels_from_grid.reshape(-1, cams, 3, 4)
    points = np.ascontiguousarray(centers, np.float32)
    ends = [len(points)]
    if batch_index is not None:
        ends = np.searchsorted(batch_index, np.arange(len(maps)), side="right").tolist()
        if ends[-1] != len(points) or (len(points) and batch_index[0] < 0) or (np.diff(batch_index) < 0).any():
            raise ValueError(f"batch_index decreases or leaves 0..{len(maps) - 1}: sort the voxels by sample")
    out = np.empty((len(points), channels), np.float32)
    num_views = np.empty(len(points), np.uint8)
    start = 0
    for sample, end in enumerate(ends):
        one_scale = None if scale is None else scale[sample]
        _sample(maps[sample], one_scale, pixels_from_grid[sample], float(image_size[1]), float(image_size[0]),
                points[start:end], out[start:end], num_views[start:end])  # fmt: skip
        start = end
    return out if dtype == "float32" else torch.from_numpy(out).half().numpy(), num_views


def _check_shapes(
    features: Any, feature_scale: Any, cam_from_grid: Any, intrinsics: Any, centers: Any, batch_index: Any
) -> None:
    """Raises ValueError on shapes that do not match. Takes tensors or arrays."""
    lead = tuple(features.shape[:-3])
    if len(lead) != (1 if batch_index is None else 2):
        raise ValueError(
            f"features of shape {tuple(features.shape)} with{'out' if batch_index is None else ''} a batch_index: "
            "expected (cams, h, w, C), or (batch, cams, h, w, C) and a batch_index"
        )
    expected = {"cam_from_grid": (cam_from_grid, (*lead, 4, 4)), "intrinsics": (intrinsics, (*lead, 3, 3))}
    expected["centers"] = (centers, (centers.shape[0], 3))
    if feature_scale is not None:
        expected["feature_scale"] = (feature_scale, tuple(features.shape[:-1]))
    if batch_index is not None:
        expected["batch_index"] = (batch_index, (centers.shape[0],))
    for name, (array, shape) in expected.items():
        if tuple(array.shape) != shape:
            raise ValueError(
                f"{name} of shape {tuple(array.shape)} beside features of {tuple(features.shape)}: expected {shape}"
            )
    if ("int8" in str(features.dtype)) != (feature_scale is not None):
        raise ValueError(f"features are {features.dtype}: int8 needs feature_scale, other types must not have it")


@numba.njit(forceinline=True, fastmath={"contract"})
def _blend(c: int, t00: Any, t01: Any, t10: Any, t11: Any, w00: Any, w01: Any, w10: Any, w11: Any) -> Any:
    """Weighted sum of channel c of four tokens; multiplications and additions may be fused."""
    top = w00 * np.float32(t00[c]) + w01 * np.float32(t01[c])
    return top + (w10 * np.float32(t10[c]) + w11 * np.float32(t11[c]))


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _sample(
    maps: NDArray[Any],  # (cams, h, w, C) float32 or int8
    scale: NDArray[np.float32] | None,  # (cams, h, w)
    pixels_from_grid: NDArray[np.float64],  # (cams, 3, 4)
    width: float,
    height: float,
    centers: NDArray[np.float32],  # (n, 3)
    out: NDArray[np.float32],  # (n, C)
    num_views: NDArray[np.uint8],  # (n,)
) -> None:
    cams, h, w, channels = maps.shape
    points = np.empty((3, _BLOCK))
    column, row = np.empty((cams, _BLOCK)), np.empty((cams, _BLOCK))
    is_valid = np.empty((cams, _BLOCK), np.uint8)
    total = np.empty(channels, np.float32)
    one = np.float32(1)
    for start in range(0, centers.shape[0], _BLOCK):
        count = min(_BLOCK, centers.shape[0] - start)
        for i in range(count):
            points[0, i], points[1, i], points[2, i] = centers[start + i]
        for cam in range(cams):  # vectorised over voxels: pixels of points behind the camera are computed but not used
            p, q, r = pixels_from_grid[cam]
            columns, rows, valid = column[cam], row[cam], is_valid[cam]
            for i in range(count):
                x, y, z = points[0, i], points[1, i], points[2, i]
                depth = r[0] * x + r[1] * y + r[2] * z + r[3]
                u = (p[0] * x + p[1] * y + p[2] * z + p[3]) / depth
                v = (q[0] * x + q[1] * y + q[2] * z + q[3]) / depth
                valid[i] = (depth > 0) & (u >= 0) & (u < width) & (v >= 0) & (v < height)
                columns[i] = min(max(u * (w / width) - 0.5, 0.0), w - 1.0)
                rows[i] = min(max(v * (h / height) - 0.5, 0.0), h - 1.0)
        for i in range(count):
            views = 0
            for cam in range(cams):
                views += is_valid[cam, i]
            num_views[start + i] = views
            target = out[start + i]
            if views == 0:
                target[:] = 0
                continue
            if views > 1:
                total[:] = 0
            for cam in range(cams):
                if not is_valid[cam, i]:
                    continue
                x0, y0 = int(column[cam, i]), int(row[cam, i])
                x1, y1 = min(x0 + 1, w - 1), min(y0 + 1, h - 1)
                right, lower = np.float32(column[cam, i] - x0), np.float32(row[cam, i] - y0)
                upper = (one - lower) / np.float32(views)
                lower /= np.float32(views)
                w00, w01, w10, w11 = upper * (one - right), upper * right, lower * (one - right), lower * right
                if scale is not None:
                    w00, w01 = w00 * np.float32(scale[cam, y0, x0]), w01 * np.float32(scale[cam, y0, x1])
                    w10, w11 = w10 * np.float32(scale[cam, y1, x0]), w11 * np.float32(scale[cam, y1, x1])
                t00, t01, t10, t11 = maps[cam, y0, x0], maps[cam, y0, x1], maps[cam, y1, x0], maps[cam, y1, x1]
                if views == 1:  # nine of ten voxels: write directly, without the intermediate sum
                    for c in range(channels):
                        target[c] = _blend(c, t00, t01, t10, t11, w00, w01, w10, w11)
                else:
                    for c in range(channels):
                        total[c] += _blend(c, t00, t01, t10, t11, w00, w01, w10, w11)
            if views > 1:
                for c in range(channels):
                    target[c] = total[c]

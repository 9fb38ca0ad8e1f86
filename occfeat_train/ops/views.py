"""Input of a network: a batch of surround images and their calibration; and which camera sees a point of the grid.

A camera sees a point in front of it whose projection is inside the area of the image that shows the scene. A camera whose
`cam_from_grid` is all zeros is masked: every depth is 0, so it sees no point.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

Coordinate = Float[Tensor, "... 1"]  # of points; the last axis broadcasts to the cameras
PerCamera = Float[Tensor, "*points V"]

# Mean and standard deviation of RGB in [0, 1]; all pretrained backbones here were trained with these values.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Views:
    """Images of B samples, V cameras each, all of one size.

    images: RGB, (value in [0, 1] - IMAGENET_MEAN) / IMAGENET_STD.
    intrinsics: float64, of exactly these images, after any resize, crop and mirroring [px]. fx is negative if
    and only if the image is mirrored; the network mirrors the features of such a view back before the lifting.
    cam_from_grid: float64, from the grid's (right, forward, up) to each camera's axes [m]; zeros for a masked camera.
    area: float64 (top, left, bottom, right) [px] of the part of each image that shows the scene; None for whole images.
    """

    images: Float[Tensor, "B V 3 height width"]
    intrinsics: Float[Tensor, "B V 3 3"]
    cam_from_grid: Float[Tensor, "B V 4 4"]
    area: Float[Tensor, "B V 4"] | None = None

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) [px]."""
        height, width = self.images.shape[-2:]
        return height, width

    @cached_property
    def cameras(self) -> Cameras:
        """Of all samples, without gradients."""
        return Cameras.of(self.intrinsics.detach(), self.cam_from_grid.detach(), self.image_size, self.area)


class Projection(NamedTuple):
    """Pixel (u, v) and depth [m] of points in each camera, and whether the camera sees the point. u, v and depth are arbitrary elsewhere."""

    u: PerCamera
    v: PerCamera
    depth: PerCamera
    is_seen: Bool[Tensor, "*points V"]


@dataclass(frozen=True)
class Cameras:
    """Projections from the grid into V cameras; with a leading axis for the samples of a batch.

    pixels_from_grid: float64, intrinsics @ cam_from_grid. area: float64 (top, left, bottom, right) [px].
    image_size: (height, width) [px].
    """

    pixels_from_grid: Float[Tensor, "*B V 3 4"]
    area: Float[Tensor, "*B V 4"]
    image_size: tuple[int, int]

    @classmethod
    def of(
        cls,
        intrinsics: Float[Tensor, "*B V 3 3"],
        cam_from_grid: Float[Tensor, "*B V 4 4"],
        image_size: tuple[int, int],
        area: Shaped[Tensor, "*B V 4"] | None = None,
    ) -> Cameras:
        """area: None for whole images."""
        return cls.from_matrices(intrinsics.double() @ cam_from_grid[..., :3, :].double(), image_size, area)

    @property
    def grid_from_pixels(self) -> tuple[Float[Tensor, "*B V 4 4"], Bool[Tensor, "*B V"]]:
        """Inverses of the projections with a last row (0, 0, 0, 1), and which exist. A masked camera has none."""
        matrix = self.pixels_from_grid.detach()
        last_row = matrix.new_zeros((*matrix.shape[:-2], 1, 4))
        last_row[..., 3] = 1  # a tensor of numbers would be copied to a GPU, which waits
        inverse, failed = torch.linalg.inv_ex(torch.cat([matrix, last_row], -2))
        return inverse, failed == 0

    @classmethod
    def from_matrices(
        cls,
        pixels_from_grid: Float[Tensor, "*B V 3 4"],
        image_size: tuple[int, int],
        area: Shaped[Tensor, "*B V 4"] | None = None,
    ) -> Cameras:
        """pixels_from_grid: float64. area: None for whole images."""
        if area is None:
            area = pixels_from_grid.new_zeros((*pixels_from_grid.shape[:-2], 4))
            area[..., 2], area[..., 3] = image_size  # filled on the device, so that the host does not wait
        return cls(pixels_from_grid, area.to(pixels_from_grid), image_size)

    def __getitem__(self, sample: int) -> Cameras:
        return Cameras(self.pixels_from_grid[sample], self.area[sample], self.image_size)

    def to(self, device: torch.device) -> Cameras:
        """A copy from the host to a GPU needs no synchronisation."""
        asynchronous = self.area.device.type == "cpu"
        matrices, area = (t.to(device, non_blocking=asynchronous) for t in (self.pixels_from_grid, self.area))
        return Cameras(matrices, area, self.image_size)

    def homogeneous(self, x: Coordinate, y: Coordinate, z: Coordinate) -> tuple[PerCamera, PerCamera, PerCamera]:
        """(u * depth, v * depth, depth) of points (right, forward, up) [m].

        Sums in this order everywhere, also in the kernels, so that every path finds the same cameras for a point.
        """
        u, v, depth = (
            row[..., 0] * x + row[..., 1] * y + row[..., 2] * z + row[..., 3]
            for row in self.pixels_from_grid.unbind(-2)
        )
        return u, v, depth

    def project(self, x: Coordinate, y: Coordinate, z: Coordinate) -> Projection:
        """Of points as in `homogeneous`."""
        u, v, depth = self.homogeneous(x, y, z)
        u, v = u / depth, v / depth
        return Projection(u, v, depth, (depth > 0) & self.is_inside(u, v))

    def is_inside(self, u: Float[Tensor, " ..."], v: Float[Tensor, " ..."]) -> Bool[Tensor, "... V"]:
        """Whether a pixel is inside the area, which includes its upper and left border only."""
        top, left, bottom, right = self.area.unbind(-1)
        return (u >= left) & (u < right) & (v >= top) & (v < bottom)

    def token_area(self, feature_size: tuple[int, int]) -> Float[Tensor, "*B V 4"]:
        """First and last (row, column, row, column) at which maps of (h, w) tokens are read in view.

        These are the centres of the area's outermost tokens, 0 and h - 1 or w - 1 for a whole image. In an area narrower
        than a token, both are at its upper or left border.
        """
        (height, width), (h, w) = self.image_size, feature_size
        top, left, bottom, right = self.area.unbind(-1)
        first = [(top * h / height).clamp(0, h - 1), (left * w / width).clamp(0, w - 1)]
        last = [(bottom * h / height - 1).clamp(max=h - 1), (right * w / width - 1).clamp(max=w - 1)]
        return torch.stack([*first, *(torch.maximum(a, b) for a, b in zip(first, last, strict=True))], -1)

    def packed(self, feature_size: tuple[int, int]) -> Float[Tensor, "*B V 20"]:
        """For the kernels: pixels_from_grid (12), area (4), token_area (4)."""
        return torch.cat([self.pixels_from_grid.flatten(-2), self.area, self.token_area(feature_size)], -1)

    def to_tokens(self, u: PerCamera, v: PerCamera, feature_size: tuple[int, int]) -> tuple[PerCamera, PerCamera]:
        """Pixels -> (column, row) in tokens of maps of (h, w) tokens; 0 is the centre of the first token.

        The centre of token (row i, column j) is at ((j + 0.5) * width / w, (i + 0.5) * height / h) pixels.
        """
        (height, width), (h, w) = self.image_size, feature_size
        return u * (w / width) - 0.5, v * (h / height) - 0.5

    def to_tokens_in_view(
        self, u: PerCamera, v: PerCamera, feature_size: tuple[int, int]
    ) -> tuple[PerCamera, PerCamera]:
        """`to_tokens`, but beyond the outermost centres in the area the border token is read: a point in view is never attenuated."""
        column, row = self.to_tokens(u, v, feature_size)
        top, left, bottom, right = self.token_area(feature_size).unbind(-1)
        return column.clamp(left, right), row.clamp(top, bottom)


def check_shapes(features: Tensor, views: Views) -> None:
    """Raises ValueError unless features (B, V, C, h, w), of any floating-point type, and views have the same B and V."""
    if features.dim() != 5 or not features.is_floating_point():
        raise ValueError(f"features of shape {tuple(features.shape)}, {features.dtype}: expected float (B, V, C, h, w)")
    tails = {"images": (3, *views.image_size), "intrinsics": (3, 3), "cam_from_grid": (4, 4), "area": (4,)}
    for name, tail in tails.items():
        tensor, expected = getattr(views, name), (*features.shape[:2], *tail)
        if tensor is not None and tuple(tensor.shape) != expected:
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)} beside features of {tuple(features.shape)}: expected {expected}"
            )


def check_arguments(
    features: Any, feature_scale: Any, cam_from_grid: Any, intrinsics: Any, centers: Any, area: Any
) -> None:
    """Raises ValueError unless tensors or arrays are features (V, h, w, C) of one sample and its cameras, and points (n, 3)."""
    if len(features.shape) != 4:
        raise ValueError(f"features of shape {tuple(features.shape)}: expected (V, h, w, C)")
    views = features.shape[0]
    expected = {
        "cam_from_grid": (cam_from_grid, (views, 4, 4)),
        "intrinsics": (intrinsics, (views, 3, 3)),
        "area": (area, (views, 4)),
        "centers": (centers, (centers.shape[0], 3)),
        "feature_scale": (feature_scale, tuple(features.shape[:-1])),
    }
    for name, (array, shape) in expected.items():
        if array is not None and tuple(array.shape) != shape:
            raise ValueError(
                f"{name} of shape {tuple(array.shape)} beside features of {tuple(features.shape)}: expected {shape}"
            )
    if ("int8" in str(features.dtype)) != (feature_scale is not None):
        raise ValueError(f"features are {features.dtype}: int8 needs feature_scale, other types must not have it")

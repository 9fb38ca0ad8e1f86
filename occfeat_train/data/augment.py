"""Simple-BEV's augmentations: parameters are sampled on the host from (seed, epoch, sample) and applied on the device.

All images of a batch are resized, cropped and mirrored together, as two matrix products (rows and columns of an
antialiased triangle filter). The intrinsics are transformed exactly: pixel i covers [i, i + 1), so a resize scales fx and
cx, a crop shifts cx, and mirroring makes fx negative.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64, Shaped
from numpy.typing import NDArray
from torch import Tensor

from occfeat_train.config import AugmentConfig
from occfeat_train.ops.views import IMAGENET_MEAN, IMAGENET_STD


@dataclass(frozen=True)
class Draw:
    """Augmentation of one sample with V cameras.

    resized: (V, 2) int (height, width) after resizing; crop: (V, 2) int (top, left) of the final image in the resized
    image; mirror: (V,) bool; cameras: (n,) int, indices of the cameras used, in their order;
    bev_flip: (2,) bool (forward, right); frame: index of the grid's reference frame.
    """

    resized: Int64[NDArray[Any], "V 2"]
    crop: Int64[NDArray[Any], "V 2"]
    mirror: Bool[NDArray[Any], " V"]
    cameras: Int64[NDArray[Any], " n"]
    bev_flip: Bool[NDArray[Any], " 2"]
    frame: int


def draw(
    rng: np.random.Generator, config: AugmentConfig, image_size: tuple[int, int], num_cameras: int, frames: list[int]
) -> Draw:
    """Sample the augmentation of one sample. image_size: final (height, width) [px]. frames: reference frames to choose from.

    All random numbers are always sampled, so that turning one augmentation off does not change the others.
    """
    factor = rng.uniform(*config.resize, num_cameras)
    shift = rng.uniform(-1, 1, (num_cameras, 2)) * int(image_size[0] * config.crop)
    mirror, flip = rng.random(num_cameras) < 0.5, rng.random(2) < 0.5
    cameras, frame = rng.permutation(num_cameras), frames[rng.integers(len(frames))]
    resized = (factor[:, None] * image_size).astype(np.int64)
    crop = ((resized - image_size) / 2).astype(np.int64) + shift.astype(np.int64)
    keep = config.num_cameras or num_cameras
    if not config.shuffle_cameras:
        cameras = np.sort(cameras[:keep])
    return Draw(
        resized,
        crop,
        mirror & config.flip_images,
        cameras[:keep],
        flip & config.flip_bev,
        frame if config.random_frame else frames[0],
    )


def transform_intrinsics(
    intrinsics: Float[Tensor, "*n 3 3"],
    source_size: tuple[int, int] | Int64[Tensor, "*n 2"],
    resized: Int64[Tensor, "*n 2"],
    crop: Int64[Tensor, "*n 2"],
    mirror: Bool[Tensor, "*n"],
    size: tuple[int, int],
) -> Float[Tensor, "*n 3 3"]:
    """Intrinsics after resizing from `source_size` to `resized`, cropping at `crop` and mirroring."""
    source_height, source_width = _sides(source_size)
    matrix = torch.zeros_like(intrinsics)
    matrix[..., 2, 2] = 1
    sign, resized, crop = 1 - 2 * mirror.to(matrix), resized.to(matrix), crop.to(matrix)
    matrix[..., 0, 0] = sign * resized[..., 1] / source_width
    matrix[..., 0, 2] = torch.where(mirror, size[1] + crop[..., 1], -crop[..., 1])
    matrix[..., 1, 1] = resized[..., 0] / source_height
    matrix[..., 1, 2] = -crop[..., 0]
    return matrix @ intrinsics


def transform_area(
    area: Float[Tensor, "*n 4"],
    source_size: tuple[int, int] | Int64[Tensor, "*n 2"],
    resized: Int64[Tensor, "*n 2"],
    crop: Int64[Tensor, "*n 2"],
    mirror: Bool[Tensor, "*n"],
    size: tuple[int, int],
) -> Float64[Tensor, "*n 4"]:
    """(top, left, bottom, right) [px] of the part of the final image that shows the scene, from that of the source image.

    A side at the border of the source image stays at the border of the final image, so black pixels around a resized image
    count as image, as in Simple-BEV.
    """
    sides = []
    for axis, source in enumerate(_sides(source_size)):
        scale = resized[..., axis].double() / source
        low, high = (area[..., i].double() for i in (axis, axis + 2))
        first = torch.where(low <= 0, 0, low * scale - crop[..., axis]).clamp(0, size[axis])
        last = torch.where(high >= source, size[axis], high * scale - crop[..., axis]).clamp(0, size[axis])
        sides.append((first, last))
    (top, bottom), (left, right) = sides
    left, right = torch.where(mirror, size[1] - right, left), torch.where(mirror, size[1] - left, right)
    return torch.stack([top, left, bottom, right], -1)


def _sides(size: tuple[int, int] | Int64[Tensor, "*n 2"]) -> tuple[int | Tensor, int | Tensor]:
    """Height and width, of all images or of each."""
    height, width = size if isinstance(size, tuple) else size.unbind(-1)
    return height, width


def resample(
    images: Shaped[Tensor, "B V h w 3"],
    resized: Int64[Tensor, "B V 2"],
    crop: Int64[Tensor, "B V 2"],
    mirror: Bool[Tensor, "B V"],
    size: tuple[int, int],
    source_size: Int64[Tensor, "B V 2"] | None = None,
) -> Float[Tensor, "B V 3 H W"]:
    """Resize, crop and mirror images, then normalise them with ImageNet's statistics.

    size: final (height, width). source_size: (height, width) of each image, in the top left of `images`; None if all fill
    it. Returns images that are channels-last, float32, or of autocast's dtype, to which the first
    convolution would convert them. Pixels outside the resized image are black.
    """
    batch, views, height, width, _ = images.shape
    device, dtype, exact = images.device, torch.float32, torch.float32
    if torch.is_autocast_enabled(device.type):
        # float16 holds the pixels exactly, and more bits of the weights than the result in autocast's dtype
        dtype, exact = torch.get_autocast_dtype(device.type), torch.float16
    heights, widths = (None, None) if source_size is None else source_size.unbind(-1)
    rows = filter_matrix(height, resized[..., 0], crop[..., 0], size[0], filled=heights).to(exact)
    columns = filter_matrix(width, resized[..., 1], crop[..., 1], size[1], mirror, filled=widths).to(exact)
    factor, shift = normalisation(device)
    with torch.autocast(device.type, enabled=False):
        pixels = rows @ images.flatten(-2).to(exact)  # one product for all colours, in the order of the memory
        pixels = pixels.unflatten(-1, (width, 3)).transpose(-1, -2).flatten(2, 3) @ columns.transpose(-1, -2)
        pixels = torch.addcmul(shift, pixels.unflatten(2, (size[0], 3)).transpose(2, 3), factor)
    return pixels.flatten(0, 1).to(dtype, memory_format=torch.channels_last).unflatten(0, (batch, views))


@lru_cache
def normalisation(device: torch.device) -> tuple[Float[Tensor, "3 1 1"], Float[Tensor, "3 1 1"]]:
    """factor, shift: values of 0 to 255 times factor plus shift are normalised with ImageNet's statistics."""
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (1 / (255 * std)).float().to(device), (-mean / std).float().to(device)


def filter_matrix(
    source: int,
    resized: Int64[Tensor, "*n"],
    crop: Int64[Tensor, "*n"],
    size: int,
    mirror: Bool[Tensor, "*n"] | None = None,
    filled: Int64[Tensor, "*n"] | None = None,
) -> Float[Tensor, "*n {size} {source}"]:
    """(..., size, source) filter weights of one axis: antialiased bilinear, as in Pillow and torch's `antialias=True`.

    Row j belongs to output pixel j, or to pixel size - 1 - j if mirrored. It is a triangle around the pixel's centre in the
    source, as wide as the larger of a resized pixel and a source pixel. It sums to 1, or to 0 if the pixel is outside the
    resized image. filled: how many of the source pixels are the image, None for all; the others have weight 0.
    """
    position = torch.arange(size, device=resized.device) + 0.5 + crop[..., None]  # in the resized image
    if mirror is not None:
        position = torch.where(mirror[..., None], position.flip(-1), position)
    scale = (resized / (source if filled is None else filled))[..., None].float()
    distance = torch.arange(source, device=resized.device) + 0.5 - (position / scale)[..., None]
    # in place, because these are the largest arrays of the augmentation
    weight = distance.abs_().mul_(-scale.clamp(max=1)[..., None]).add_(1).clamp_(min=0)
    if filled is not None:
        weight.mul_(torch.arange(source, device=resized.device) < filled[..., None, None])
    total = weight.sum(-1).clamp(min=1e-8)
    is_inside = (position > 0) & (position < resized[..., None])
    return weight.div_(torch.where(is_inside, total, torch.inf)[..., None])

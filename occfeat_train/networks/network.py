"""The BEV network of the paper's section 3.1, with output F_B: image encoder, lifting to the grid, BEV decoder; no head."""

from __future__ import annotations

import pkgutil
from dataclasses import replace
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import nn

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.config import lifting_class
from occfeat_train.networks.decoder import BEVDecoder
from occfeat_train.networks.encoder import ImageEncoder
from occfeat_train.ops.mirror import mirror
from occfeat_train.ops.views import Views


class Lifting(Protocol):
    """An `nn.Module` from image features to a BEV map, constructed as class(grid, channels); a row of `config.LIFTINGS`.

    grid: the VoxelGrid of the map.
    feature_channels: number of channels it takes from the encoder. All beyond `channels` are extra (LSS: depths).
    mirrors_grid: whether a mirrored grid gives exactly the mirrored map. If not, the augmentation mirrors the map itself.
    recompute: set by `BEVNetwork`; whether to use activation checkpointing, if the lifting has large activations.
    """

    grid: VoxelGrid
    feature_channels: int
    mirrors_grid: bool
    recompute: bool

    def __call__(
        self, features: Float[torch.Tensor, "B V feature_channels h w"], views: Views
    ) -> Float[torch.Tensor, "B C H W"]: ...


class BEVNetwork(nn.Module):
    """Surround images -> F_B, rows forward, columns right, index 0 the rearmost and leftmost."""

    def __init__(self, encoder: ImageEncoder, lifting: Lifting, decoder: BEVDecoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.lifting = lifting
        self.decoder = decoder

    @property
    def recompute(self) -> bool:
        """Whether activation checkpointing is used, see `ImageEncoder` and `BEVFormer`."""
        return self.encoder.backbone.recompute

    @recompute.setter
    def recompute(self, value: bool) -> None:
        self.encoder.backbone.recompute = self.lifting.recompute = value

    def forward(
        self, views: Views, bev_flip: Bool[torch.Tensor, "B 2"] | None = None
    ) -> Float[torch.Tensor, "B C H W"]:
        """bev_flip: whether to mirror a sample's (forward, right) axis between lifting and decoder.

        This is Simple-BEV's augmentation of the decoder: the lifted volume is mirrored and F_B is mirrored back, so F_B
        and all targets keep their positions. For liftings with `mirrors_grid`, mirroring the grid before the lifting gives
        the same volume at lower cost. For other liftings the lifted map is mirrored.
        """
        if bev_flip is not None and self.lifting.mirrors_grid:
            mirrored = grid_mirror(self.lifting.grid, bev_flip).to(views.cam_from_grid)
            views = replace(views, cam_from_grid=views.cam_from_grid @ mirrored[:, None])
        batch, cams = views.images.shape[:2]
        images = views.images.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        features, views = unmirror(self.encoder(images).unflatten(0, (batch, cams)), views)
        lifted: torch.Tensor = self.lifting(features, views)
        if bev_flip is not None and not self.lifting.mirrors_grid:
            lifted = mirror(lifted, bev_flip)
        bev = self.decoder(lifted)
        return bev if bev_flip is None else mirror(bev, bev_flip)


def unmirror(
    features: Float[torch.Tensor, "B V C h w"], views: Views
) -> tuple[Float[torch.Tensor, "B V C h w"], Views]:
    """Mirror the features, intrinsics and areas of mirrored views (fx < 0) back, as Simple-BEV does.

    Liftings then need no special case for mirrored images: learned offsets are in image columns, and the conventions of
    the reference (`simple_bev.quirks`) are not symmetric. views.images are not changed, because liftings read only their size.
    """
    is_mirrored, width = views.intrinsics[..., 0, 0] < 0, views.image_size[1]  # (B, V)
    plain = views.intrinsics.clone()
    plain[..., 0, :] = width * plain[..., 2, :] - plain[..., 0, :]
    intrinsics = torch.where(is_mirrored[..., None, None], plain, views.intrinsics)
    area = views.area
    if area is not None:
        top, left, bottom, right = area.unbind(-1)
        area = torch.where(is_mirrored[..., None], torch.stack([top, width - right, bottom, width - left], -1), area)
    flips = nn.functional.pad(is_mirrored.flatten()[:, None], (1, 0))  # of columns, not of rows
    features = mirror(features.flatten(0, 1), flips).unflatten(0, is_mirrored.shape)
    return features, replace(views, intrinsics=intrinsics, area=area)


def grid_mirror(grid: VoxelGrid, bev_flip: Bool[torch.Tensor, "B 2"]) -> Float[torch.Tensor, "B 4 4"]:
    """Whether to mirror (forward, right) -> float64 transforms of the grid's points that mirror it onto itself [m].

    A coordinate x on a mirrored axis becomes lower + upper - x, so cell i and cell n - 1 - i are swapped.
    """
    mirror = torch.eye(4, dtype=torch.float64, device=bev_flip.device).repeat(len(bev_flip), 1, 1)
    for column, axis in ((0, 1), (1, 0)):  # of bev_flip; of a point (right, forward, up)
        middle = grid.lower[2 - axis] + grid.upper[2 - axis]
        is_flipped = bev_flip[:, column].double()
        mirror[:, axis, axis] = 1 - 2 * is_flipped
        mirror[:, axis, 3] = middle * is_flipped
    return mirror


def build_network(
    grid: VoxelGrid,
    backbone: str,
    channels: int = 128,
    lifting: str = "simplebev",
    drop_connect: float = 0.2,
    compat: str = "none",
    recompute: bool = True,
    efficientnet: str = "tensorflow",
) -> BEVNetwork:
    """A network with random weights, channels-last.

    backbone: one of BACKBONES; lifting: one of `config.LIFTINGS`; compat: "simple-bev" reproduces the reference's defects.
    recompute: activation checkpointing. efficientnet: see `ImageEncoder`.
    Raises ValueError on an unknown name, or on a number of channels that the lifting or the decoder does not support.
    """
    lifted: Lifting = pkgutil.resolve_name(lifting_class(lifting, compat))(grid, channels)
    encoder = ImageEncoder(backbone, channels, drop_connect, lifted.feature_channels - channels, efficientnet)
    network = BEVNetwork(encoder, lifted, BEVDecoder(channels))
    network.recompute = recompute
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

"""Slow reference of the pretraining head and its losses: literally the paper's 3.2 and 3.3, dense. Also used by benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from occfeat_train.tasks.heads import OccFeatHead


class DenseHead(nn.Module):
    """Uses `nn.Conv3d` on volumes (B, C, Z, H, W). N_B = channels, Z_B = height, N_y = feature_dim."""

    def __init__(self, channels: int, height: int, feature_dim: int, *, occupancy: bool = True) -> None:
        super().__init__()
        self.groups = (height, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.InstanceNorm2d(channels)
        self.unsplat = nn.Conv2d(channels, channels * height, 1)
        self.expand = nn.Conv3d(channels, 2 * channels, 1)
        self.softplus = nn.Softplus()
        self.reduce = nn.Conv3d(2 * channels, channels, 1)
        self.occupancy = nn.Conv3d(channels, 1, 1) if occupancy else None
        self.features = nn.Conv3d(channels, feature_dim, 1) if feature_dim else None

    @classmethod
    def of(cls, head: OccFeatHead) -> DenseHead:
        """A DenseHead with the parameters of `head`."""
        feature_dim = head.features.out_features if head.features is not None else 0
        twin = cls(head.channels, head.height, feature_dim, occupancy=head.occupancy is not None).to(head.conv.weight)
        theirs = head.state_dict()
        assert theirs.keys() == twin.state_dict().keys()
        twin.load_state_dict({name: theirs[name].reshape(value.shape) for name, value in twin.state_dict().items()})
        return twin

    def forward(self, bev: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """F_B (B, N_B, H, W) -> occupancy logits (B, Z_B, H, W) and features (B, N_y, Z_B, H, W)."""
        maps = self.unsplat(torch.relu(self.norm(self.conv(bev))))
        # "dividing the channels into Z_B groups, each with N_B channels"
        volume = maps.unflatten(1, self.groups).transpose(1, 2)
        volume = self.reduce(self.softplus(self.expand(volume)))  # F_V
        logits = None if self.occupancy is None else self.occupancy(volume).squeeze(1)
        return logits, None if self.features is None else self.features(volume)


def occupancy_loss(logits: Tensor, occupied: Tensor) -> Tensor:
    """Eq. 2, a mean over samples."""
    losses = []
    for predicted, o in zip(torch.sigmoid(logits), occupied, strict=True):
        losses.append(-torch.where(o, predicted.log(), (1 - predicted).log()).sum() / o.numel())
    return torch.stack(losses).mean()


def feature_loss(features: Tensor, target: Tensor, occupied: Tensor, is_seen: Tensor) -> Tensor:
    """Eq. 3, a mean over samples. features, target: (B, N_y, Z, H, W); occupied, is_seen: (B, Z, H, W) bool."""
    losses = []
    for predicted, y, o in zip(features, target, occupied & is_seen, strict=True):
        cosine = (predicted * y).sum(0) / (predicted.norm(dim=0) * y.norm(dim=0))
        losses.append(-(cosine * o).sum() / o.sum().clamp(min=1))
    return torch.stack(losses).mean()

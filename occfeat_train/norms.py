"""The normalisation of the encoder's fusion, the lifting's compressor, the decoder's skips and the heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

_EPS = 1e-5


class InstanceNorm(nn.Module):
    """(N, C, H, W) -> the same shape; every channel of every map to mean 0 and variance 1, eps 1e-5, no parameters.

    `nn.InstanceNorm2d` without its copies to channels-first and back, which take longer than the norm. Nor is it right
    on a CPU: torch 2.13 returns a wrong gradient for one sample whose incoming gradient is channels-last. Group norm of
    one channel a group is right, but its channels-last CPU kernel takes E[x^2] - E[x]^2 in float32: an error of 1e-3
    where the mean is ten deviations. So on a CPU this computes mean and deviation in turn, as far as float32 goes.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type == "cpu":
            normed: torch.Tensor = _InstanceNorm.apply(x)
            return normed
        return functional.group_norm(x, x.shape[1], eps=_EPS)


class _InstanceNorm(torch.autograd.Function):
    """In float32 or float64 inside, whatever x is; in x's layout throughout. Keeps x, so the result may be overwritten."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        exact = _exact(x)
        mean = exact.mean((2, 3), keepdim=True)
        normed = exact - mean
        scale = torch.rsqrt((normed * normed).mean((2, 3), keepdim=True) + _EPS)
        normed *= scale
        ctx.save_for_backward(x, mean, scale)
        return normed.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        """Less what would move the mean and the variance: scale * (g - mean(g) - normed * mean(g * normed))."""
        x, mean, scale = ctx.saved_tensors
        centred, exact = _exact(x) - mean, _exact(grad)
        along = (exact * centred).mean((2, 3), keepdim=True) * scale * scale
        out = torch.addcmul(exact, centred, along, value=-1)
        out -= exact.mean((2, 3), keepdim=True)
        out *= scale
        return out.to(x.dtype)


def _exact(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()

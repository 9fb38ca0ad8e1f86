"""The normalisation of the encoder's fusion, the lifting's compressor, the decoder's skips and the heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from occfeat_train.ops.devices import runs_triton

_EPS = 1e-5


class InstanceNorm(nn.Module):
    """(N, C, H, W) -> the same shape; every channel of every map to mean 0 and variance 1, eps 1e-5, no parameters.

    The result has the input's type and layout, also in autocast. torch's own do not serve:
    `nn.InstanceNorm2d` copies to channels-first and back, and on a CPU torch 2.13 returns a wrong gradient for one
    sample whose incoming gradient is channels-last. Group norm of one channel a group is right, but its channels-last
    CPU kernel takes E[x^2] - E[x]^2 in float32, an error of 1e-3 where the mean is ten deviations; and on a GPU
    autocast computes it in float32, and it returns channels-first.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # torch.compile fuses the plain operations by itself
        is_plain = torch.compiler.is_compiling() or x.dtype == torch.float64 or not runs_triton(x.device)
        normed: torch.Tensor = (_InstanceNorm if is_plain else _TritonInstanceNorm).apply(x)
        return normed


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


class _TritonInstanceNorm(torch.autograd.Function):
    """The same by the kernels of `norm_kernels`; x of any layout, the result channels-last."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        from occfeat_train.ops.norm_kernels import normalize

        rows, out = _rows(x), torch.empty_like(x, memory_format=torch.channels_last)
        ctx.save_for_backward(rows, *normalize(rows, _EPS, _rows(out)))
        return out  # not a view, which an activation could not overwrite

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        from occfeat_train.ops.norm_kernels import normalize_backward

        out = torch.empty_like(grad, memory_format=torch.channels_last)
        x, mean, scale = ctx.saved_tensors
        normalize_backward(_rows(grad), x, mean, scale, _rows(out))
        return out


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B, H * W, C), contiguous: a view of channels-last maps."""
    return x.permute(0, 2, 3, 1).contiguous().flatten(1, 2)


def _exact(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()

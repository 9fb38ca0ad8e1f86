"""Instance normalisation, used in the encoder, the liftings, the decoder and the heads."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import nn
from torch.autograd.function import once_differentiable

from occfeat_train.ops.devices import runs_triton

_EPS = 1e-5


class InstanceNorm(nn.Module):
    """Normalises each channel of each map to mean 0 and variance 1, eps 1e-5, no parameters.

    The result has the dtype and memory format of the input, also under autocast. torch's own modules are not suitable.
    `nn.InstanceNorm2d` copies to channels-first and back, and on a CPU torch 2.13 returns a wrong gradient for a single
    sample whose incoming gradient is channels-last. Group norm with one channel per group is correct, but its
    channels-last CPU kernel computes E[x^2] - E[x]^2 in float32, with an error of 1e-3 where the mean is ten standard
    deviations. On a GPU, autocast computes group norm in float32, and it returns channels-first.
    """

    def forward(self, x: Float[torch.Tensor, "N C H W"]) -> Float[torch.Tensor, "N C H W"]:
        # torch.compile fuses the plain operations itself
        is_plain = torch.compiler.is_compiling() or x.dtype == torch.float64 or not runs_triton(x.device)
        normed: torch.Tensor = (_InstanceNorm if is_plain else _TritonInstanceNorm).apply(x)
        return normed


class _InstanceNorm(torch.autograd.Function):
    """Computes in float32 or float64, in the memory format of x. Saves x, so the result may be modified in place."""

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
        """scale * (g - mean(g) - normed * mean(g * normed))."""
        x, mean, scale = ctx.saved_tensors
        centred, exact = _exact(x) - mean, _exact(grad)
        along = (exact * centred).mean((2, 3), keepdim=True) * scale * scale
        out = torch.addcmul(exact, centred, along, value=-1)
        out -= exact.mean((2, 3), keepdim=True)
        out *= scale
        return out.to(x.dtype)


class _TritonInstanceNorm(torch.autograd.Function):
    """The same with the kernels of `instance_norm_triton`; x has any memory format, the result is channels-last."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        from occfeat_train.ops.instance_norm_triton import normalize

        rows, out = _rows(x), torch.empty_like(x, memory_format=torch.channels_last)
        ctx.save_for_backward(rows, *normalize(rows, _EPS, _rows(out)))
        return out  # not a view, so that an activation can work in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        from occfeat_train.ops.instance_norm_triton import normalize_backward

        out = torch.empty_like(grad, memory_format=torch.channels_last)
        x, mean, scale = ctx.saved_tensors
        normalize_backward(_rows(grad), x, mean, scale, _rows(out))
        return out


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B, H * W, C), contiguous; a view if x is channels-last."""
    return x.permute(0, 2, 3, 1).contiguous().flatten(1, 2)


def _exact(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()

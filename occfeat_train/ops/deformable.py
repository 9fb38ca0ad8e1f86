"""Deformable attention: every query samples maps at learned points and sums the samples with learned weights.

`bevformer` determines which query reads which map, and around which reference points. A CPU uses the numba kernels of
`deformable_numba` in float32, a GPU the Triton kernels of `deformable_triton`, and everything else torch's
embedding_bag. None of them stores the samples: each is read, weighted and added at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from occfeat_train.ops.deformable_numba import in_threads, weighted_samples, weighted_samples_backward
from occfeat_train.ops.devices import runs_triton
from occfeat_train.ops.mean_over_views import bilinear_taps

_CHUNK = 2048  # queries per task


@dataclass(frozen=True)
class Reads:
    """Which query reads which map, around which points: (query, map) pairs sorted by query; B samples one after another.

    maps: index of a pair's map; samples share no map. starts: index of each of Q queries' first pair, and the number of pairs.
    anchors: reference points (column, row) of a pair, in tokens; 0 is the centre of the first token.
    The n rows of maps and anchors may be more than the pairs: their number is then unknown to the host. The rest is not read.
    """

    batch: int
    maps: Int[Tensor, " n"]
    starts: Int[Tensor, " Q_plus_1"]
    anchors: Float[Tensor, "n A 2"]

    @property
    def queries(self) -> Int[Tensor, " n"]:
        """Index of a pair's query, if all rows are pairs."""
        every = torch.arange(len(self.starts) - 1, device=self.starts.device)
        return every.repeat_interleave(self.starts.diff(), output_size=len(self.maps))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def deformable(
    values: Float[Tensor, "M h w heads d"],
    places: Float[Tensor, "Q heads P 3"],
    reads: Reads,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "Q heads d"]:
    """Sum over a query's pairs and over its points p of weight p times its map at anchor (p mod A) plus offset p.

    values: maps, bilinearly sampled, 0 outside. places: sampling points, each an offset (column, row) in tokens and a score.
    The weights are the softmax of the scores over the points of a query and head. P is a multiple of A.
    Returns `dtype`, to which the float32 sums are rounded, or float64 if values are; gradients reach values and places.
    """
    if values.dtype == torch.float64:
        return deformable_torch(values, places, reads)
    if runs_triton(values.device) and not torch.are_deterministic_algorithms_enabled():
        return deformable_triton(values, places, reads, dtype)
    if values.device.type == "cpu":
        found: Tensor = _Deformable.apply(values.float(), places.float(), reads)
        return found.to(dtype)
    return deformable_torch(values, places, reads).to(dtype)


def deformable_triton(
    values: Float[Tensor, "M h w heads d"],
    places: Float[Tensor, "Q heads P 3"],
    reads: Reads,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "Q heads d"]:
    """`deformable` with the Triton kernels, for a GPU and any floating-point type except float64.

    The last bits of gradients differ between runs.
    """
    found: Tensor = _TritonDeformable.apply(values, places.float(), reads, dtype)
    return found


def deformable_torch(
    values: Float[Tensor, "M h w heads d"], places: Float[Tensor, "Q heads P 3"], reads: Reads
) -> Float[Tensor, "Q heads d"]:
    """`deformable` in plain torch, for any device, one sample at a time.

    A whole batch can have more elements than embedding_bag's gradient can index on a GPU (2^31).
    """
    queries, maps = (len(reads.starts) - 1) // reads.batch, len(values) // reads.batch
    bounds = reads.starts[::queries].tolist()
    found = []
    for sample, (own, placed) in enumerate(zip(values.split(maps), places.split(queries), strict=True)):
        pairs = slice(bounds[sample], bounds[sample + 1])
        starts = reads.starts[sample * queries : (sample + 1) * queries + 1] - bounds[sample]
        found.append(
            _one_sample(own, placed, Reads(1, reads.maps[pairs] - sample * maps, starts, reads.anchors[pairs]))
        )
    return torch.cat(found)


def _one_sample(values: Tensor, places: Tensor, reads: Reads) -> Tensor:
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    values, places = values.to(dtype), places.to(dtype)
    offsets, weights = places[..., :2], places[..., 2].softmax(-1)
    _, h, w, heads, d = values.shape
    queries, points = reads.queries, weights.shape[2]
    anchors = reads.anchors.to(dtype).repeat(1, points // reads.anchors.shape[1], 1)
    x, y = (anchors[:, None] + offsets[queries]).unbind(-1)  # (n, heads, P)
    tokens, taps = bilinear_taps(x, y, (h, w), weights[queries])  # (n, heads, P, 4)
    tokens = (tokens + (reads.maps * (h * w)).view(-1, 1, 1, 1)) * heads
    tokens += torch.arange(heads, device=values.device).view(-1, 1, 1)
    size = points * 4
    rows = nn.functional.embedding_bag(
        tokens.view(-1, size), values.reshape(-1, d), mode="sum", per_sample_weights=taps.view(-1, size)
    )
    every_pair = torch.arange(len(queries), device=values.device)
    summed = nn.functional.embedding_bag(
        every_pair, rows.view(-1, heads * d), reads.starts, mode="sum", include_last_offset=True
    )
    return summed.view(-1, heads, d)


class _TritonDeformable(torch.autograd.Function):
    """Values (M, h, w, heads, d) and places (Q, heads, P, 3) float32 -> (Q, heads, d)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, places: Tensor, reads: Reads, dtype: torch.dtype) -> Tensor:
        from occfeat_train.ops.deformable_triton import weighted_samples

        values, places = values.contiguous(), places.contiguous()
        ctx.save_for_backward(values, places)
        maps, starts, anchors = ctx.reads = reads.maps, reads.starts, reads.anchors.float().contiguous()
        return weighted_samples(values, places, maps, starts, anchors, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        from occfeat_train.ops.deformable_triton import weighted_samples_backward

        given = ctx.saved_tensors  # read once: activation checkpointing allows only one read
        of_values, of_places = weighted_samples_backward(grad.contiguous(), *given, *ctx.reads)
        return of_values.to(given[0].dtype), of_places, None, None


class _Deformable(torch.autograd.Function):
    """The numba kernels, in float32."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, places: Tensor, reads: Reads) -> Tensor:
        values, places = values.contiguous(), places.contiguous()
        ctx.save_for_backward(values, places)
        ctx.reads = reads
        num_queries, heads = places.shape[:2]
        out = torch.empty((num_queries, heads, values.shape[-1]))
        arguments: Any = _arrays(values, places, reads)
        target = out.numpy()

        def work(first: int) -> None:
            weighted_samples(*arguments, (first, min(first + _CHUNK, num_queries)), target)

        in_threads(work, list(range(0, num_queries, _CHUNK)))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Each task processes one head of one sample, in order, so no two tasks add to the same gradient."""
        values, places = ctx.saved_tensors
        grads = torch.zeros(values.shape), torch.zeros(places.shape)
        arguments: Any = _arrays(values, places, ctx.reads)
        given = grad.contiguous().numpy()
        targets = grads[0].flatten(1, 2).numpy(), grads[1].numpy()
        num_queries, heads = places.shape[:2]
        per_sample = num_queries // ctx.reads.batch

        def work(task: tuple[int, int]) -> None:
            first, head = task
            weighted_samples_backward(given, *arguments, (first, first + per_sample), head, *targets)

        in_threads(work, [(first, head) for first in range(0, num_queries, per_sample) for head in range(heads)])
        return *grads, None


def _arrays(values: Tensor, places: Tensor, reads: Reads) -> Any:
    tensors = (values.flatten(1, 2), places, reads.starts, reads.anchors.float(), reads.maps)
    tokens, *rest = (t.detach().contiguous().numpy() for t in tensors)
    return tokens, tuple(values.shape[1:3]), *rest

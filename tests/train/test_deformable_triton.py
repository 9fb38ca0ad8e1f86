"""The Triton kernels of deformable attention: values and gradients against plain torch in float64, and compilation for GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from occfeat_train.ops.deformable import Reads, deformable_torch, deformable_triton
from tests.train.interpreted import compiled, interpreted

pytest.importorskip("triton", reason="no Triton for this platform")
KERNELS = "occfeat_train.ops.deformable_triton"


def inputs(
    batch: int,
    queries: int,
    maps: int,
    size: tuple[int, int],
    heads: int,
    d: int,
    points: int,
    anchors: int,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Reads]:
    """Values, sampling points, and reads. Every query reads 0 to `maps` maps; some positions are outside."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, maps + 1, (batch * queries,), generator=generator)
    total = int(counts.sum())
    sample = (torch.arange(batch * queries) // queries).repeat_interleave(counts)
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    which = sample * maps + torch.randint(0, maps, (total,), generator=generator)
    corner = torch.tensor([size[1] + 1.0, size[0] + 1.0])
    places = torch.rand(total, anchors, 2, generator=generator) * corner - 1
    values = torch.randn(batch * maps, *size, heads, d, generator=generator)
    return (
        values,
        torch.randn(batch * queries, heads, points, 3, generator=generator),
        Reads(batch, which, starts, places),
    )


def values_and_gradients(function: object, values: Tensor, places: Tensor, reads: Reads) -> list[Tensor]:
    leaves = [values.clone().requires_grad_(), places.clone().requires_grad_()]
    out = function(*leaves, reads)  # type: ignore[operator]
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(1, 2),
    queries=st.integers(1, 7),
    maps=st.integers(1, 3),
    size=st.sampled_from([(1, 1), (3, 4), (5, 2)]),
    heads=st.integers(1, 4),
    d=st.sampled_from([1, 3, 8]),
    points=st.sampled_from([(1, 1), (4, 2), (3, 3)]),
    seed=st.integers(0, 2**31),
)
def test_interpreted_values_and_gradients_equal_plain_torch(
    batch: int, queries: int, maps: int, size: tuple[int, int], heads: int, d: int, points: tuple[int, int], seed: int
) -> None:
    given = inputs(batch, queries, maps, size, heads, d, *points, seed=seed)
    with interpreted(KERNELS) as kernels, pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_TILE", 32)
        found = values_and_gradients(deformable_triton, *given)
    # In float32, a position near a token's centre may be on its other side, where the position's gradient jumps.
    exact = values_and_gradients(deformable_torch, *(t.double() for t in given[:2]), given[2])
    for ours, other in zip(found[:2], exact[:2], strict=True):
        torch.testing.assert_close(ours.double(), other, atol=2e-5 * max(1.0, other.abs().max().item()), rtol=0)
    is_safe = _far_from_centres(given[1], given[2])[..., None]
    torch.testing.assert_close(
        found[2].double() * is_safe, exact[2] * is_safe, atol=5e-5 * max(1.0, exact[2].abs().max().item()), rtol=0
    )


def _far_from_centres(places: Tensor, reads: Reads) -> Tensor:
    """(Q, heads, P) bool: all positions of the point are more than 1e-4 tokens from an integer."""
    anchors = reads.anchors.double().repeat(1, places.shape[2] // reads.anchors.shape[1], 1)
    where = anchors[:, None] + places[reads.queries][..., :2].double()
    is_near = ((where - where.round()).abs() < 1e-4).any(-1)
    count = torch.zeros(places.shape[:-1], dtype=torch.int64).index_add_(0, reads.queries, is_near.long())
    return count == 0


def test_a_half_precision_result_is_the_rounded_float32_result_and_takes_half_precision_gradients() -> None:
    values, places, reads = inputs(1, 5, 2, (3, 4), 2, 4, 4, 2)
    with interpreted(KERNELS):
        exact = values_and_gradients(deformable_triton, values, places, reads)
        found = values_and_gradients(lambda *given: deformable_triton(*given, torch.float16), values, places, reads)
    assert torch.equal(found[0], exact[0].half())
    for ours, other in zip(found[1:], exact[1:], strict=True):  # the gradient of the result is rounded
        torch.testing.assert_close(ours, other, atol=2e-3 * other.abs().max().item(), rtol=0)


@pytest.mark.parametrize("target", [80, 90])
def test_the_kernels_compile_for_a_gpu(target: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    values, places, reads = inputs(1, 40, 2, (4, 6), 4, 32, 8, 8)
    rest = places, reads.maps, reads.starts, reads.anchors

    def launch(kernels: object) -> None:
        given = values.bfloat16(), *rest
        out = kernels.weighted_samples(*given, torch.bfloat16)  # type: ignore[attr-defined]
        kernels.weighted_samples_backward(out, *given)  # type: ignore[attr-defined]

    assert set(compiled(KERNELS, target, launch, monkeypatch, tmp_path)) == {"_forward", "_backward"}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_equals_plain_torch(dtype: torch.dtype) -> None:
    values, places, reads = inputs(2, 5_000, 6, (28, 50), 4, 32, 8, 8)
    given = (
        values.to(dtype).cuda(),
        places.cuda(),
        Reads(2, *(t.cuda() for t in (reads.maps, reads.starts, reads.anchors))),
    )
    found = values_and_gradients(deformable_triton, *given)
    exact = values_and_gradients(deformable_torch, given[0].double(), given[1].double(), given[2])
    for ours, other in zip(found[:2], exact[:2], strict=True):
        assert (ours.double() - other).norm() / other.norm() < max(1e-5, torch.finfo(dtype).eps)
    is_safe = _far_from_centres(places, reads)[..., None].cuda()
    assert ((found[2].double() - exact[2]) * is_safe).norm() / exact[2].norm() < 1e-4

"""By rows: values and gradients are those of the plain functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.networks.bevformer import AddDropped, BEVFormer
from occfeat_train.ops import rows
from occfeat_train.ops.rows import by_rows, feed_forward
from tests.train.test_lifting import random_features, random_views


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """So that small inputs are several pieces, the last one shorter."""
    monkeypatch.setattr(rows, "_ROWS", 4)
    monkeypatch.setattr(rows, "_HIDDEN_ROWS", 3)
    yield


def linears(channels: int, hidden: int, dtype: torch.dtype = torch.float64) -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    return nn.Linear(channels, hidden, dtype=dtype), nn.Linear(hidden, channels, dtype=dtype)


def plain_feed_forward(x: Tensor, first: nn.Linear, second: nn.Linear) -> Tensor:
    return x + second(first(x).relu())


def mixed(a: Tensor, b: Tensor, is_left_out: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of two widths and of none, and two results."""
    c = nn.functional.linear(a * a, weight, bias)
    return c.masked_fill(is_left_out, 0) * b, (a + c).sum(1, keepdim=True)


def gradients(function: Callable[..., Tensor], x: Tensor, first: nn.Linear, second: nn.Linear) -> list[Tensor]:
    leaf = x.detach().clone().requires_grad_()
    for layer in (first, second):
        layer.zero_grad()
    out = function(leaf, first, second)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    given = [leaf.grad, *(p.grad for layer in (first, second) for p in layer.parameters())]
    return [out.detach(), *(t for t in given if t is not None)]


def test_gradcheck_of_the_feed_forward_layers(few_rows: None) -> None:
    first, second = linears(4, 6)
    x = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, *_: Tensor) -> Tensor:
        return feed_forward(x, first, second)

    assert torch.equal(feed_forward(x, first, second) > 0, plain_feed_forward(x, first, second) > 0)
    assert torch.autograd.gradcheck(function, (x, *first.parameters(), *second.parameters()))


def test_gradcheck_by_rows_and_the_plain_values(few_rows: None) -> None:
    torch.manual_seed(0)
    sizes = [(9, 3), (9, 1), (3, 3), (3,)]
    a, b, weight, bias = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes)
    is_left_out = torch.rand(9, 3) < 0.5

    def function(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return by_rows(mixed, (a, b, is_left_out), (weight, bias))

    for found, expected in zip(function(a, b, weight, bias), mixed(a, b, is_left_out, weight, bias), strict=True):
        torch.testing.assert_close(found, expected)
    assert torch.autograd.gradcheck(function, (a, b, weight, bias))


def test_a_map_of_the_papers_size_has_the_plain_gradients() -> None:
    first, second = linears(128, 1028, torch.float32)
    x = torch.randn(40_000, 128)
    found, expected = (gradients(f, x, first, second) for f in (feed_forward, plain_feed_forward))
    for a, b in zip(found, expected, strict=True):
        # a hidden value of rounding's size may be on the other side of the ReLU
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_any_number_of_threads_has_the_plain_gradients_and_torch_keeps_its_own(few_rows: None) -> None:
    first, second = linears(4, 6)
    x = torch.randn(8, 4, dtype=torch.float64)
    expected = gradients(plain_feed_forward, x, first, second)
    before = torch.get_num_threads()
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        found = gradients(feed_forward, x, first, second)
        assert torch.get_num_threads() == threads
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
    torch.set_num_threads(before)


def test_autocast_computes_what_linear_layers_do() -> None:
    first, second = linears(16, 32, torch.float32)
    x = torch.randn(5000, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (gradients(f, x, first, second) for f in (feed_forward, plain_feed_forward))
        assert by_rows(lambda x: (first(x),), (x,), ())[0].dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler looks at it
def test_it_goes_through_the_compiler() -> None:
    first, second = linears(4, 6, torch.float32)
    x = torch.randn(8, 4)
    compiled = torch.compile(lambda x: feed_forward(x * 1, first, second) + 1, backend="eager")
    torch.testing.assert_close(compiled(x), plain_feed_forward(x, first, second) + 1)


def test_a_tenth_is_dropped_and_the_rest_scaled_and_every_time_others() -> None:
    layer = AddDropped(0.1).train()
    query, read = torch.zeros(3001, 33, requires_grad=True), torch.ones(3001, 33, requires_grad=True)

    def run() -> Tensor:
        return layer(query, read, None, torch.eye(33), torch.zeros(33), None)  # type: ignore[no-any-return]

    torch.manual_seed(1)
    first, other = run(), run()
    torch.manual_seed(1)
    assert torch.equal(run(), first)
    assert not torch.equal(other, first)
    kept = first != 0
    assert 0.895 < kept.float().mean() < 0.905
    torch.testing.assert_close(first[kept], torch.full_like(first[kept], 1 / 0.9), rtol=1e-4, atol=0)
    (gradient,) = torch.autograd.grad(first.sum(), read)
    torch.testing.assert_close(gradient, first)
    assert torch.equal(layer.eval()(query, read, None, torch.eye(33), torch.zeros(33), None), read)


def test_a_layer_keeps_a_handful_of_maps_and_nothing_of_its_hidden_values() -> None:
    """Of the queries, their own positions' included: 1028 hidden values alone would be eight more."""
    grid = VoxelGrid((8, 32, 32))
    model, views = BEVFormer(grid, 128), random_views(0, 1, 2)
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        alive.append(t)
        if t.is_floating_point() and t.shape[:1] == (32 * 32,):
            kept[t.untyped_storage().data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        alive.append(model(random_features(1, 2, 128), views))
    maps = sum(kept.values()) / (32 * 32 * 128)
    assert len(model.layers) * 5 < maps < len(model.layers) * 8

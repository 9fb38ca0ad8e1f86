"""A tiny cache and a run pretrained on it. Tests may evaluate the run, but must not change cache or run otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.train.runs import pretrain, steps, succeed, write_caches


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.zarr and val.zarr."""
    return write_caches(tmp_path_factory.mktemp("caches"))


@pytest.fixture(scope="session")
def pretrained(cache, tmp_path_factory) -> Path:
    """A run of two steps."""
    out = tmp_path_factory.mktemp("pretrained") / "run"
    output = succeed(*pretrain(cache, out, *steps(2)))
    assert "SIMULATED: all of it" in output
    assert "occfeat: simplebev efficientnet-b0" in output and "images 32x48, grid 4x12x12" in output
    assert "7 samples" in output and "2 steps of 2; adam constant lr 0.0001, on 1 x cpu" in output
    assert f"finished: {out}" in output
    return out


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)

"""`lift_triton` on a CPU: its kernels run by Triton's interpreter, in NumPy."""

from __future__ import annotations

import importlib.util
import sys
from functools import lru_cache
from types import ModuleType

import pytest
from torch import Tensor

from occfeat_targets.grid import VoxelGrid
from occfeat_train.lifting import lift_triton
from occfeat_train.views import Views

KERNELS = "occfeat_train.lifting_kernels"


@lru_cache
def _kernels() -> ModuleType:
    """The module a second time: whether a kernel is interpreted is decided once, where it is defined."""
    spec = importlib.util.find_spec(KERNELS)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setitem(sys.modules, KERNELS, module)
        spec.loader.exec_module(module)
    return module


def lift_interpreted(features: Tensor, views: Views, grid: VoxelGrid, compat: str | None = None) -> Tensor:
    """As `lift_triton`. Everything else in this process sees the compiled kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, KERNELS, _kernels())
        return lift_triton(features, views, grid, compat)

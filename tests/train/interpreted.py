"""`lift_triton` on a CPU: its kernels run by Triton's interpreter, in NumPy."""

from __future__ import annotations

import importlib.util
import sys
from functools import lru_cache
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from occfeat_targets.grid import VoxelGrid
from occfeat_train.lifting import lift_triton
from occfeat_train.views import Views

KERNELS = "occfeat_train.lifting_kernels"
HAS_TRITON = importlib.util.find_spec("triton") is not None


@lru_cache
def _kernels() -> ModuleType:
    """The module a second time: whether a kernel is interpreted is decided once, where it is defined."""
    import triton

    spec = importlib.util.find_spec(KERNELS)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setitem(sys.modules, KERNELS, module)
        spec.loader.exec_module(module)
    module._launch = np.errstate(all="ignore")(module._launch)  # it divides by a depth of 0 where nobody looks
    module._plus = triton.language.standard._sum_combine  # the one sum that is left to NumPy, all others are loops
    return module


@torch.compiler.disable
def lift_interpreted(features: Tensor, views: Views, grid: VoxelGrid, compat: str | None = None) -> Tensor:
    """As `lift_triton`. The rest of this process sees the compiled kernels.

    What is stored as bfloat16 is cut off, where a GPU rounds.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, KERNELS, _kernels())
        return lift_triton(features, views, grid, compat)

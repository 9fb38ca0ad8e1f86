"""Triton kernels without a GPU: run by Triton's NumPy interpreter, or compiled for a GPU."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.ops.mean_over_views import lift_triton
from occfeat_train.ops.views import Views

LIFTING = "occfeat_train.ops.mean_over_views_triton"
HAS_TRITON = importlib.util.find_spec("triton") is not None


@lru_cache
def _kernels(name: str) -> ModuleType:
    """A second instance of a module of kernels, because Triton selects the interpreter when a kernel is defined."""
    import triton

    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setitem(sys.modules, name, module)
        if name != LIFTING:
            patch.setitem(sys.modules, LIFTING, _kernels(LIFTING))  # contains functions that other kernels call
        spec.loader.exec_module(module)
    if name == LIFTING:
        module.run_kernel = np.errstate(all="ignore")(
            module.run_kernel
        )  # divides by depths of 0; the results are unused
        module._plus = triton.language.standard._sum_combine  # the only sum done by NumPy
    return module


def _max(x: Any, axis: int) -> Any:
    """Triton's `max` over a vector.

    Triton 3.6 stores a scalar as an array of one element, which NumPy 2.4 and newer do not convert to an int.
    """
    import triton.language as tl

    out = tl.reduce(x, axis, tl.standard._elementwise_max)
    out.handle.data = out.handle.data.reshape(())
    return out


@contextlib.contextmanager
def interpreted(name: str) -> Iterator[ModuleType]:
    """Within the context, importing the module of kernels `name` gives the interpreted one.

    The interpreter truncates values stored as bfloat16; a GPU rounds them.
    """
    import triton.language as tl

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, name, _kernels(name))
        # Triton's own `sum` and `max` were created as compiled functions when it was imported
        patch.setattr(tl, "sum", lambda x, axis: tl.reduce(x, axis, tl.standard._sum_combine))
        patch.setattr(tl, "max", _max)
        yield _kernels(name)


@torch.compiler.disable
def lift_interpreted(features: Tensor, views: Views, grid: VoxelGrid) -> Tensor:
    """`lift_triton` with interpreted kernels in forward and backward. Other code still uses the compiled kernels."""
    with interpreted(LIFTING):
        return lift_triton(features, views, grid)


class _Recorder:
    """Replaces a kernel and records the arguments of its launches."""

    def __init__(self, kernel: Any, calls: list[Any]) -> None:
        self.kernel, self.calls = kernel, calls

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **options: self.calls.append((self.kernel, arguments, options))


def not_launched(name: str, patch: pytest.MonkeyPatch) -> list[Any]:
    """Replace the kernels of the module `name`, so that its functions call them without effect. Returns the list of their launches."""
    from triton.runtime.jit import JITFunction

    calls: list[Any] = []
    module = importlib.import_module(name)
    for key, value in list(vars(module).items()):
        if isinstance(value, JITFunction):
            patch.setattr(module, key, _Recorder(value, calls))
    return calls


def compiled(
    name: str, target: int, call: Callable[[ModuleType], Any], patch: pytest.MonkeyPatch, cache: Path
) -> dict[str, str]:
    """{kernel: PTX} of all launches in call(module of kernels `name`), compiled for compute capability `target`, e.g. 90."""
    pytest.importorskip("triton", minversion="3.3", reason="its compiler is called otherwise")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    patch.setenv("TRITON_CACHE_DIR", str(cache))
    module = importlib.import_module(name)
    with pytest.MonkeyPatch.context() as recording:
        calls = not_launched(name, recording)
        call(module)
    types = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64"}
    types |= {torch.int64: "*i64", torch.bool: "*i1"}
    found = {}
    for kernel, arguments, options in calls:
        is_constant = {p.name for p in kernel.params if p.is_constexpr}
        signature, constants = {}, {}
        for i, (key, value) in enumerate(zip(kernel.arg_names, arguments, strict=True)):
            if isinstance(value, Tensor):
                signature[key] = types[value.dtype]
            elif key in is_constant:
                signature[key], constants[(i,)] = "constexpr", value
            else:
                signature[key] = "i32"
        source = ASTSource(kernel, signature, constants)
        found[kernel.__name__] = compile(source, target=GPUTarget("cuda", target, 32), options=options).asm["ptx"]
    return found

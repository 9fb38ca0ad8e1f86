"""Operations that would make the host wait for a GPU, found on a CPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

PACKAGE = Path(__file__).parents[2] / "occfeat_train"
# The size or the value of their results depends on values on the device. They are found also where other operations call them.
OPERATIONS = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount", "histc", "_unique", "_unique2",
    "unique_dim", "unique_consecutive", "unique_dim_consecutive", "_linalg_check_errors",
}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}  # with a mask
READS = {Tensor.tolist, Tensor.numpy, Tensor.cpu}
# Without `device` they make a tensor on the host, which is then copied; `tensor` also copies values from the host to a device.
CREATION = {
    torch.arange, torch.linspace, torch.zeros, torch.ones, torch.full, torch.empty, torch.eye, torch.rand, torch.randn,
}  # fmt: skip
FROM_VALUES = {torch.tensor, torch.as_tensor}


class HostWaits(TorchDispatchMode):
    """Within the context, lists each such operation as "file:line operation"; the line is the innermost one of occfeat_train.

    Operations in the backward pass of torch's own functions have no line. Not found: copies of unpinned memory, and waits
    inside torch's CUDA functions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._functions = _Functions(self.add)

    def __enter__(self) -> HostWaits:
        self._functions.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *given: Any) -> None:
        super().__exit__(*given)
        self._functions.__exit__(*given)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        masks = (
            [t for t in args[1] if t is not None and t.dtype in (torch.bool, torch.uint8)] if name in INDEXING else []
        )
        is_unsized = (
            name == "repeat_interleave" and func._overloadname == "Tensor" and kwargs.get("output_size") is None
        )
        if name in OPERATIONS or masks or is_unsized:
            self.add(f"{name} with a mask" if masks else name)
        return func(*args, **kwargs)

    def add(self, operation: str) -> None:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and not Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
            frame = frame.f_back
        where = "" if frame is None else f"{Path(frame.f_code.co_filename).relative_to(PACKAGE)}:{frame.f_lineno} "
        self.found.append(where + operation)


class _Functions(TorchFunctionMode):
    """Calls that are not visible as operations."""

    def __init__(self, add: Callable[[str], None]) -> None:
        super().__init__()
        self.add = add

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in READS or func in FROM_VALUES or (func in CREATION and kwargs.get("device") is None):
            self.add(func.__name__)
        return func(*args, **kwargs)

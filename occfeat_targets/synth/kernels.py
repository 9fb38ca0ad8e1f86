"""The decorator of the city's kernels: numba, cached on disk, without the GIL, IEEE division by zero."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from occfeat_targets.common.compiled import compiled

_SOURCES = sorted(Path(__file__).parent.glob("*.py"))
_STAMP = hashlib.sha256(b"".join(p.read_bytes() for p in _SOURCES)).hexdigest()


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function; a change in any file of this package invalidates its cache.

    Numba checks only the function's own file, so callers of a kernel in another file would keep an old inlined version.
    """
    machine_code: Any = compiled(error_model="numpy", fastmath={"arcp", "contract", "nsz"})(function)
    if cache := getattr(machine_code, "_cache", None):  # none under NUMBA_DISABLE_JIT
        cache._cache_file._source_stamp = _STAMP
    return machine_code

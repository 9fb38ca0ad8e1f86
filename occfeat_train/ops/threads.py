"""Compiled kernels let go of the GIL: here they get threads of their own, on torch's number of them. Numba's would reset
torch's count (OpenMP) or break when two threads enter (workqueue).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch


def in_threads(work: Callable[[Any], Any], tasks: list[Any]) -> Iterable[Any]:
    """Results in order. Threads are made anew, 0.1 ms, so that none is missing in a forked process."""
    threads = min(torch.get_num_threads(), len(tasks))
    if threads <= 1:
        return [work(task) for task in tasks]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, tasks))

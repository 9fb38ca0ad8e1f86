"""Threads for numba kernels that release the GIL, as many as torch uses.

Numba's own threads would reset torch's number of threads (OpenMP), or fail when two threads enter (workqueue).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch


def in_threads(work: Callable[[Any], Any], tasks: list[Any]) -> Iterable[Any]:
    """Results in order. Threads are created for each call (0.1 ms), so that they also exist in a forked process."""
    threads = min(torch.get_num_threads(), len(tasks))
    if threads <= 1:
        return [work(task) for task in tasks]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, tasks))

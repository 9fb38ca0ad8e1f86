"""Prefetching: a pool of threads reads batches ahead of the training loop."""

from __future__ import annotations

import collections
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from occfeat_train.data.batch import Batch
from occfeat_train.data.mixture import Samples


class Prefetcher:
    """Iterates over batches that a pool of threads prefetches; reading releases the GIL.

    For a GPU, batches are pinned and copied on a separate stream. `waited` is the time the loop waited for data [s].
    """

    def __init__(
        self,
        dataset: Samples,
        batches: Iterable[Sequence[tuple[int, int]]],
        device: torch.device,
        *,
        workers: int = 4,
        ahead: int = 4,
    ) -> None:
        self._dataset, self._batches, self._device = dataset, iter(batches), device
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="prefetch", initializer=self._select_device)
        self._ahead = max(ahead, workers)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.waited = 0.0

    def _select_device(self) -> None:
        """A new thread's current device is the first GPU, where it would open a second CUDA context."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    def _load(self, samples: Sequence[tuple[int, int]]) -> tuple[Batch, torch.cuda.Event | None]:
        batch = self._dataset.batch(samples, pinned=self._stream is not None)
        if self._stream is None:
            return batch, None
        with torch.cuda.stream(self._stream):
            batch = batch.pin_memory().to(self._device)
            return batch, self._stream.record_event()

    def __iter__(self) -> Iterator[Batch]:
        pending: collections.deque[Future[tuple[Batch, torch.cuda.Event | None]]] = collections.deque()
        try:
            while True:
                while len(pending) < self._ahead and (samples := next(self._batches, None)) is not None:
                    pending.append(self._pool.submit(self._load, samples))
                if not pending:
                    return
                start = time.perf_counter()
                batch, event = pending.popleft().result()
                self.waited += time.perf_counter() - start
                if event is not None:
                    stream = torch.cuda.current_stream(self._device)
                    stream.wait_event(event)
                    batch.record_stream(stream)
                yield batch
        finally:
            for future in pending:
                future.cancel()
            self._pool.shutdown(cancel_futures=True)

"""The forward and backward pass of a training step as CUDA graphs.

A step launches about 2,000 kernels, and the host takes longer to launch them than a fast GPU to run them. A CUDA graph records
the launches of a pass once and repeats them with one call. It repeats them with the same shapes and addresses, so a batch is
copied into fixed tensors, and ragged targets are padded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from occfeat_train.data.batch import Batch

_EAGER = 3  # passes before the first recording, in which libraries choose and compile their kernels
Losses = dict[str, Tensor]
Pass = Callable[[Batch], Losses]
Replay = Callable[[], None]


class CudaGraphs:
    """Runs and records on a stream of its own, as recording requires. Only one graph runs at a time, so they share memory."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream, self._pool = device, torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def run(self, function: Callable[[], Losses]) -> tuple[Losses, str]:
        """function(), and where in the code it waited for the GPU, or ""."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), _waits() as found:
            losses = function()
        current.wait_stream(self._stream)
        return losses, ", ".join(dict.fromkeys(found))

    def record(self, function: Callable[[], Losses]) -> tuple[Replay, Losses]:
        """Record function() without executing it. Returns a function that executes it, and the result, which that fills.

        Raises RuntimeError if the function does something that cannot be recorded, or needs more memory than is free.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            # The loader's threads go on allocating and copying meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                losses = function()
        except RuntimeError:
            # torch's random numbers would still expect to be recorded
            torch.cuda.default_generators[self._device.index].graphsafe_set_state(torch.Generator(self._device))
            raise
        return graph.replay, losses

    def release(self) -> None:
        """Return the memory of graphs that no longer exist."""
        self._pool = torch.cuda.graph_pool_handle()
        gc.collect()
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _waits() -> Iterator[list[str]]:
    """Collects "file:line" of every call within that waits for the GPU. Other warnings are passed on."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        message = str(warning.message)
        if "called a synchronizing" in message:
            found.append(f"{Path(warning.filename).name}:{warning.lineno}")
        elif "Synchronization debug mode" not in message:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


@dataclass
class _Recording:
    """A pass for one shape of batches. replay, losses and grads are set when it is recorded. waits: see `CudaGraphs.run`."""

    batch: Batch
    calls: int = 0
    waits: str = ""
    replay: Replay | None = None
    losses: Losses = dataclasses.field(default_factory=dict)
    grads: list[Tensor | None] = dataclasses.field(default_factory=list)


class GraphedPass:
    """`run` as CUDA graphs, one per shape of its batches; the same results as `run`.

    run: forward and backward pass of a batch; returns detached scalars.
    parameters: whose gradients it computes. ragged: `Task.ragged`. notify: called with a message if a pass waits for the GPU or
    cannot be recorded; it is called as it is from then on.
    """

    def __init__(
        self,
        run: Pass,
        parameters: Iterable[nn.Parameter],
        ragged: Collection[str],
        graphs: CudaGraphs,
        notify: Callable[[str], None],
    ) -> None:
        self._run, self._parameters, self._ragged = run, list(parameters), ragged
        self._graphs, self._notify = graphs, notify
        self._recordings: dict[tuple[object, ...], _Recording] = {}
        self._calls, self._failed = 0, False

    def __call__(self, batch: Batch) -> Losses:
        """Adds to the gradients. The returned tensors are valid until the next call."""
        if self._failed:
            return self._run(batch)
        recording = self._recording(batch)
        copy_padded(batch, recording.batch)
        # A new shape may need new kernels, so it is called once before it is recorded.
        if recording.replay is None and recording.calls and self._calls >= _EAGER:
            self._record(recording)
        self._calls, recording.calls = self._calls + 1, recording.calls + 1
        if recording.replay is None:
            return self._call(recording)
        before = [None if p.grad is None else p.grad.clone() for p in self._parameters]  # of earlier micro-batches
        recording.replay()
        for parameter, earlier, grad in zip(self._parameters, before, recording.grads, strict=True):
            parameter.grad = grad if earlier is None or grad is None else grad.add_(earlier)
        return recording.losses

    def release(self) -> None:
        """Forget all recordings and return their memory. Passes are recorded again when they are called."""
        self._recordings = {}
        self._graphs.release()

    def _call(self, recording: _Recording) -> Losses:
        """Call the pass as it is. If the memory that recordings hold is needed for it, they are released."""
        is_first = all(p.grad is None for p in self._parameters)
        try:
            losses, recording.waits = self._graphs.run(lambda: self._run(recording.batch))
            return losses
        except torch.OutOfMemoryError:
            if not is_first or all(each.replay is None for each in self._recordings.values()):
                raise
        for parameter in self._parameters:
            parameter.grad = None  # of the incomplete pass
        self.release()
        return self._call(recording)

    def _recording(self, batch: Batch) -> _Recording:
        shapes = tuple(
            (name, padded_length(len(array)) if name in self._ragged else None) for name, array in batch.arrays.items()
        )
        key = (*shapes, batch.images.shape, batch.cameras.shape, batch.area is None, batch.source_size is None)
        if key not in self._recordings:
            self._recordings[key] = _Recording(padded(batch, self._ragged))
        return self._recordings[key]

    def _record(self, recording: _Recording) -> None:
        """Record the pass; it runs at the first replay."""
        if recording.waits:
            return self._give_up(f"the step waits for the GPU in {recording.waits}")
        before = [p.grad for p in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None  # so that the pass writes its gradients instead of adding them
        try:
            recording.replay, recording.losses = self._graphs.record(lambda: self._run(recording.batch))
            recording.grads = [p.grad for p in self._parameters]
        except RuntimeError as err:
            self._give_up(str(err).splitlines()[0])
        for parameter, grad in zip(self._parameters, before, strict=True):
            parameter.grad = grad

    def _give_up(self, reason: str) -> None:
        self._failed, self._recordings = True, {}
        self._notify(f"training continues without CUDA graphs, which make it faster: {reason}")


def padded_length(rows: int) -> int:
    """Up to a quarter more rows, or up to 255, so that few lengths occur."""
    unit = max(1 << max(rows.bit_length() - 3, 0), 256)
    return -(-rows // unit) * unit


def padded(batch: Batch, ragged: Collection[str]) -> Batch:
    """An uninitialised batch, on the same device, with ragged arrays of padded lengths."""
    empty = batch.map(torch.empty_like)
    arrays = {
        name: array.new_empty((padded_length(len(array)), *array.shape[1:])) if name in ragged else array
        for name, array in empty.arrays.items()
    }
    return dataclasses.replace(empty, arrays=arrays)


def copy_padded(source: Batch, target: Batch) -> None:
    """Copy a batch into one of `padded`. Added rows are -1 in arrays of integers, and 0 in others."""
    for given, fixed in zip(source.tensors(), target.tensors(), strict=True):
        fixed[: len(given)].copy_(given)
        fixed[len(given) :].fill_(0 if fixed.is_floating_point() else -1)

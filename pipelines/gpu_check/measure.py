"""Shared by all parts of the check: device, results file, times and peak memory."""

from __future__ import annotations

import contextlib
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def append(out: Path, record: dict[str, Any]) -> None:
    """Append a record to out/results.jsonl with a single write, so that a reader never sees an incomplete line."""
    line = json.dumps({"at": round(time.time(), 2), **record}, default=str) + "\n"
    with (out / "results.jsonl").open("ab", buffering=0) as file:
        file.write(line.encode())
    print("[{}] {}".format(record["part"], {k: v for k, v in record.items() if k not in ("part", "trace")}), flush=True)


def describe(err: Exception) -> str:
    """Type and message of an error, at most 500 characters."""
    return f"{type(err).__name__}: {err}"[:500]


@dataclass
class Check:
    """The running check.

    small: dry run with tiny sizes. out: directory of the results. scratch: temporary directory shared by all parts.
    part: name of the part that is running.
    """

    device: torch.device
    small: bool
    out: Path
    scratch: Path
    part: str = ""

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def batch(self) -> int:
        """The paper's batch size, or that of a dry run."""
        return 2 if self.small else 16

    def record(self, what: str, **values: Any) -> None:
        """Append one finding of this part. `ok=False` and `error` mark it as bad, `skipped` gives a reason."""
        append(self.out, {"part": self.part, "what": what, **values})

    @contextlib.contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """Record an exception and continue. Raises it again if the CUDA context is broken."""
        try:
            yield
        except Exception as err:
            self.record(what, error=describe(err))
            self.synchronize()
        self.free()

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        """Return unused memory to the device."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()

    def autocast(self, enabled: bool = True) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def times(
        self, contenders: Mapping[str, Callable[[], Any]], rounds: int = 10, *, calls: int = 1
    ) -> dict[str, list[float]]:
        """Times of a call [ms], each the mean of `calls` successive ones, between which the host does not wait.

        The contenders alternate, so that a drift of the clock rate affects all of them equally.
        """
        for function in contenders.values():
            for _ in range(1 if self.small else 3):
                function()
        found: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(1 if self.small else rounds):
            for name, function in contenders.items():
                self.synchronize()
                began = time.perf_counter()
                for _ in range(calls):
                    function()
                self.synchronize()
                found[name].append(1e3 * (time.perf_counter() - began) / calls)
        return found

    def ms(self, function: Callable[[], Any], rounds: int = 10, *, calls: int = 1) -> float:
        """Median time of a call [ms], see `times`."""
        return round(statistics.median(self.times({"": function}, rounds, calls=calls)[""]), 3)

    def memory(self, function: Callable[[], Any]) -> dict[str, float]:
        """Peak of the allocated memory during a call, and its increase over the memory before the call [GB]. Empty on a CPU."""
        if not self.is_cuda:
            return {}
        self.free()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        function()
        self.synchronize()
        peak = torch.cuda.max_memory_allocated(self.device)
        return {"peak_gb": round(peak / 1e9, 2), "increase_gb": round((peak - before) / 1e9, 2)}

    def reserved(self) -> dict[str, float]:
        """Memory held by all tensors and recorded graphs [GB]. Empty on a CPU."""
        self.free()
        return {"reserved_gb": round(torch.cuda.memory_reserved(self.device) / 1e9, 2)} if self.is_cuda else {}


def distance(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||, in float64 on the host."""
    found, expected = (t.detach().double().cpu() for t in (found, expected))
    return float(f"{(found - expected).norm() / expected.norm().clamp(min=1e-30):.2e}")

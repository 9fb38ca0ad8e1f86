"""The GPU check: correctness, speed, memory, and where the time of a step is spent, on this GPU.

    bash pipelines/gpu_check/run.sh --minutes 7.5
    python -m pipelines.gpu_check --device cpu --small     # a dry run of every part, from the root of the checkout

Worker processes run the parts in the order of their value and append each finding to OUT/results.jsonl immediately. A part
that raises, hangs, aborts its process or breaks its CUDA context does not affect other parts: the next worker runs the
remaining parts. Each of the other networks runs in a separate process. Exit code 1 if a part failed or a finding is bad.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipelines.gpu_check.measure import Check, append, describe

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Part:
    """module, function: the code to run; options: keyword arguments of a function that returns this code.

    seconds: time limit. own_process: do not run other parts in the same process.
    """

    module: str
    function: str
    seconds: float
    options: dict[str, Any] | None = None
    own_process: bool = False

    def run(self, check: Check) -> None:
        function = getattr(importlib.import_module(f"pipelines.gpu_check.{self.module}"), self.function)
        (function if self.options is None else function(**self.options))(check)


def _network(**options: Any) -> Part:
    return Part("speed", "network", 60, options, own_process=True)


PARTS = {
    "env": Part("speed", "env", 60),
    "pytest": Part("correctness", "run_pytest", 150),
    "correct": Part("correctness", "correct", 100),
    "graphs": Part("correctness", "graphs", 60),
    "step": Part("speed", "step", 90),
    "bevformer": _network(lifting="bevformer"),
    "resnet-50": _network(backbone="resnet-50"),
    "lss": _network(lifting="lss"),
    "cvt": _network(lifting="cvt"),
    "img-also": _network(task="img-also"),
    "448x800": _network(image_size=(448, 800)),
    "variants": Part("speed", "variants", 150),
    "kernels": Part("kernels", "kernels", 60),
    "cli": Part("programs", "cli", 90),
    "ranks": Part("programs", "ranks", 40),
    "memory": Part("speed", "memory", 120),
    "loader": Part("programs", "loader", 60),
    "teacher": Part("teacher", "teacher", 60),
}
_START_S = 120.0  # time limit for a worker to reach its first part
_LAST_S = 20.0  # no worker starts if less time is left
FAULTS = {"raise": lambda: 1 / 0, "hang": lambda: time.sleep(10_000), "abort": os.abort}


def work(options: argparse.Namespace) -> None:
    """Run the parts in this process."""
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    check = Check(device, options.small, options.out, options.scratch)
    faults = dict(fault.split("=") for fault in options.fault)
    for name in options.parts:
        check.part = name
        append(options.out, {"part": name, "state": "begun"})
        began = time.perf_counter()
        ending: dict[str, Any] = {"state": "done"}
        try:
            if name in faults:
                FAULTS[faults[name]]()
            PARTS[name].run(check)
            check.synchronize()
        except Exception as err:
            ending = {"state": "failed", "error": describe(err), "trace": traceback.format_exc()[-2500:]}
        append(options.out, {"part": name, **ending, "seconds": round(time.perf_counter() - began, 1)})
        try:
            check.synchronize()
            check.free()
        except RuntimeError:
            os._exit(3)  # the CUDA context is broken; the next worker continues


def read(out: Path) -> list[dict[str, Any]]:
    """All records up to now."""
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def states(out: Path) -> dict[str, dict[str, Any]]:
    """{part: its newest record with a state}."""
    return {record["part"]: record for record in read(out) if "state" in record}


def first_group(pending: list[str]) -> list[str]:
    """The parts for the next worker: one part with own_process, or all parts before the next such part."""
    if PARTS[pending[0]].own_process:
        return pending[:1]
    ends = [i for i, name in enumerate(pending) if PARTS[name].own_process]
    return pending[: ends[0]] if ends else pending


def limit_of(part: str, options: argparse.Namespace) -> float:
    """Time limit of a part [s]: --limit, else its own, times ten in a dry run."""
    given = dict(limit.split("=") for limit in options.limit)
    return float(given.get(part, PARTS[part].seconds * (10 if options.small else 1)))


def run_worker(options: argparse.Namespace, group: list[str], deadline: float) -> None:
    """Run a worker. If a part exceeds its limit or the deadline is reached, kill the worker and all its processes."""
    command = [sys.executable, "-m", "pipelines.gpu_check", "--worker", "--device", options.device]
    command += ["--out", options.out, "--scratch", options.scratch, "--parts", *group]
    command += ["--small"] * options.small + ["--fault", *options.fault] * bool(options.fault)
    began = time.time()
    worker = subprocess.Popen([str(c) for c in command], cwd=ROOT, start_new_session=True)
    reason = ""
    try:
        while worker.poll() is None and not reason:
            time.sleep(0.2)
            known = states(options.out)
            running = [name for name in group if known.get(name, {}).get("state") == "begun"]
            limit = limit_of(running[0], options) if running else _START_S
            since = max([began, *(known[name]["at"] for name in group if name in known)])
            if time.time() > deadline:
                reason = "no time left"
            elif time.time() - since > limit:
                reason = f"ended after {limit:g} s"
    finally:
        if worker.poll() is None:
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
    known = states(options.out)
    reason = reason or f"its process ended with {worker.returncode}"
    first = min((record["at"] for record in read(options.out) if record["part"] in group), default=time.time())
    append(options.out, {"part": "worker", "what": "start", "seconds": round(first - began, 1), "parts": group})
    ended = [name for name in group if known.get(name, {}).get("state") == "begun"]
    if not any(name in known for name in group):
        ended = group[:1]  # the worker did not start
    for name in ended:
        append(options.out, {"part": name, "state": "ended", "error": reason, "seconds": round(time.time() - began, 1)})


def summarise(out: Path) -> bool:
    """Print states, bad findings and times. Returns true if there is no failed part and no bad finding."""
    records = read(out)
    is_bad = [r for r in records if "error" in r or r.get("ok") is False or r.get("state") == "not begun"]
    print("\n| part | state | seconds |\n|---|---|---|")
    for name, record in states(out).items():
        print(f"| {name} | {record['state']} | {record.get('seconds', '')} |")
    print("\n| part | what | ms | samples/s | peak GB |\n|---|---|---|---|---|")
    for r in records:
        if "ms" in r:
            print("|", " | ".join(str(r.get(k, "")) for k in ("part", "what", "ms", "samples_per_s", "peak_gb")), "|")
    print(f"\n{len(is_bad)} bad findings")
    for record in is_bad:
        print("-", {k: v for k, v in record.items() if k not in ("at", "trace")})
    return not is_bad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes, for a dry run")
    parser.add_argument("--minutes", type=float, default=7.5, help="time limit of the whole check")
    parser.add_argument(
        "--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART", help=", ".join(PARTS)
    )
    parser.add_argument("--out", type=Path, default=Path("gpu_check_out"))
    parser.add_argument("--limit", nargs="+", default=[], metavar="PART=SECONDS", help="time limit of a part")
    parser.add_argument("--fault", nargs="+", default=[], metavar="PART=KIND", help=f"for tests; {', '.join(FAULTS)}")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out = options.out.resolve()
    if options.worker:
        return work(options)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no GPU; --device cpu --small is a dry run")
    deadline = time.time() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.jsonl").write_text("")
    with tempfile.TemporaryDirectory() as scratch:
        options.scratch = Path(scratch)
        pending = list(options.parts)
        while pending and time.time() < deadline - _LAST_S:
            run_worker(options, first_group(pending), deadline)
            pending = [name for name in pending if name not in states(options.out)]
    for name in pending:
        append(options.out, {"part": name, "state": "not begun"})
    sys.exit(0 if summarise(options.out) else 1)


if __name__ == "__main__":
    main()

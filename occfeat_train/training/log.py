"""Log of a run: one JSON record per step, optional TensorBoard, a progress bar."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from occfeat_targets.cache.records import write_file
from occfeat_targets.common.plural import count
from occfeat_targets.common.progress import progress_bar
from occfeat_targets.common.provenance import timestamp
from occfeat_targets.common.terminal import echo
from occfeat_train.training.event_file import EventFile
from occfeat_train.training.saving import saving

# Fields of every record of a step that the report and the benchmarks read.
FIELDS = {"loss", "epoch", "samples_per_s", "data_wait"}


class RunLog:
    """RUN/log.jsonl and RUN/tensorboard. Records from `start` on are dropped when a killed run continues there.

    Damaged lines before them are kept unchanged, and their numbers are printed.
    """

    def __init__(self, run: Path, *, start: int, total: int, tensorboard: bool, progress: bool) -> None:
        file = run / "log.jsonl"
        kept = lines_before(start, run) if start and file.is_file() else []
        with saving(file):
            write_file(file, b"".join(line + b"\n" for line, _ in kept))
        if note := note_on_damage(file, kept):
            echo(f"{note}, kept unchanged")
        self._name = f"{file}{' and tensorboard' * tensorboard}"
        with saving(self._name), contextlib.ExitStack() as files:
            self._file = files.enter_context(file.open("ab"))
            self._events = None
            if tensorboard:
                self._events = files.enter_context(contextlib.closing(EventFile(run / "tensorboard", start)))
            self._files = files.pop_all()
        self._bar = progress_bar(total, initial=start, unit="step", disable=not progress)

    def step(self, record: dict[str, Any]) -> None:
        """Log the record of a training step; `step` counts from 0."""
        self._write(record, "train")
        self._bar.set_postfix_str(
            f"loss {record['loss']:.4f}, {record['samples_per_s']:.3g} samples/s, waiting for data {record['data_wait']:.1%}",
            refresh=False,  # update draws the bar, at most ten times a second
        )
        self._bar.update()

    def validation(self, step: int, results: dict[str, Any], columns: Mapping[str, str]) -> None:
        """Log the validation results after `step` steps, and print their columns, {name: text}."""
        self._write({"step": step - 1, "validation": results}, "validation")
        with self._bar.external_write_mode():
            shown = "; ".join(f"{name} {text}" for name, text in columns.items())
            echo(f"validation after {count(step, 'step')}: {shown}")

    def _write(self, record: dict[str, Any], group: str) -> None:
        with saving(self._name):
            self._file.write(json.dumps({**record, "time": timestamp()}).encode() + b"\n")
            self._file.flush()
            if self._events is not None:
                values = record.get("validation", record).items()
                scalars = {f"{group}/{k}": v for k, v in values if isinstance(v, int | float) and k != "step"}
                self._events.add(scalars, record["step"])

    def close(self) -> None:
        self._bar.close()
        with saving(self._name):
            self._files.close()


def read_log(run: Path) -> list[dict[str, Any]]:
    """The records of a run. Damaged lines are left out."""
    return [record for _, record in read_lines(run) if record is not None]


def read_lines(run: Path) -> list[tuple[bytes, dict[str, Any] | None]]:
    """The lines of a run's log and their records, None for a damaged line. The half-written last line of a killed run is left out."""
    *lines, rest = (run / "log.jsonl").read_bytes().split(b"\n")
    if parse(rest) is not None:
        lines.append(rest)
    return [(line, parse(line)) for line in lines]


def note_on_damage(file: Path, lines: Sequence[tuple[bytes, dict[str, Any] | None]]) -> str:
    """How many lines of `read_lines` are damaged, and which; empty if none is."""
    damaged = [str(number) for number, (_, record) in enumerate(lines, 1) if record is None]
    shown = ", ".join(damaged[:5]) + ", ..." * (len(damaged) > 5)
    return f"{file} has {count(len(damaged), 'damaged line')} ({shown})" if damaged else ""


def parse(line: bytes) -> dict[str, Any] | None:
    """The record in a line; None if the line is damaged."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    is_record = isinstance(record, dict) and isinstance(record.get("step"), int)
    return record if is_record and ("validation" in record or record.keys() >= FIELDS) else None


def lines_before(step: int, run: Path) -> list[tuple[bytes, dict[str, Any] | None]]:
    """The lines of a run's log before `step`, with the damaged lines among them."""
    lines = read_lines(run)
    last = max((i for i, (_, record) in enumerate(lines) if record and record["step"] < step), default=-1)
    end = next((i for i, (_, record) in enumerate(lines) if record and i > last), len(lines))
    return [(line, record) for line, record in lines[:end] if record is None or record["step"] < step]

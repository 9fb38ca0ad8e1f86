"""Log of a run: one JSON record per step, optional TensorBoard, a progress bar."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tqdm import tqdm


class RunLog:
    """RUN/log.jsonl and RUN/tensorboard. Records from `start` on are dropped when a killed run continues there."""

    def __init__(self, run: Path, *, start: int, total: int, tensorboard: bool, progress: bool) -> None:
        file = run / "log.jsonl"
        kept = read_log(run, before=start) if file.is_file() else []
        partial = file.with_suffix(".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        partial.rename(file)
        self._file = file.open("a", buffering=1)
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=start)
        self._bar = tqdm(total=total, initial=start, unit="step", disable=not progress, dynamic_ncols=True)

    def step(self, record: dict[str, Any]) -> None:
        """Log the record of a training step; `step` counts from 0."""
        self._write(record, "train")
        self._bar.update()
        self._bar.set_postfix_str(
            f"loss {record['loss']:.4f}, {record['samples_per_s']:.3g} samples/s, waiting for data {record['data_wait']:.1%}"
        )

    def validation(self, step: int, results: dict[str, Any]) -> None:
        """Log the validation results after `step` steps."""
        self._write({"step": step - 1, "validation": results}, "validation")

    def _write(self, record: dict[str, Any], group: str) -> None:
        self._file.write(json.dumps(record) + "\n")
        if self._writer is not None:
            for name, value in record.get("validation", record).items():
                if isinstance(value, int | float) and name != "step":
                    self._writer.add_scalar(f"{group}/{name}", value, record["step"])

    def close(self) -> None:
        self._bar.close()
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def read_log(run: Path, *, before: int | None = None) -> list[dict[str, Any]]:
    """The records of a run for steps below `before`. A truncated last line of a killed run is ignored."""
    records = []
    for line in (run / "log.jsonl").read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if before is None or record["step"] < before:
            records.append(record)
    return records

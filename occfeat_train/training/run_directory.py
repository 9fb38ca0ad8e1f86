"""The directory of a run: created for a config, or continued if it holds the same run."""

from __future__ import annotations

import json
from pathlib import Path

import torch.distributed as dist

from occfeat_train.distributed import Process, prepare_together
from occfeat_train.training.checkpoint import (
    INFO,
    Checkpoint,
    CheckpointError,
    RunInfo,
    checkpoint_folders,
    find_checkpoint,
    first_line,
    flush,
)
from occfeat_train.training.run_lock import LOCK

_PARTIAL = "config.partial"


def begin_run(run: Path, info: RunInfo) -> Checkpoint | None:
    """Create RUN for this config, or continue the existing run if its config is the same. Its lock is held.

    A run without a checkpoint is overwritten, because there is nothing to continue. Returns the checkpoint to continue from,
    or None at the beginning. Raises CheckpointError that lists every difference, or if RUN is not a run.
    """
    file = run / INFO
    has_checkpoint = bool(checkpoint_folders(run))
    if file.is_file():
        try:
            found = RunInfo.from_dict(json.loads(file.read_text()))
        except (ValueError, KeyError, TypeError) as err:
            raise CheckpointError(f"{file} can't be used ({first_line(err)}): choose another --out") from err
        differences = found.config.differences(info.config)
        if found.cache != info.cache:
            differences.append(f"cache fingerprint: {found.cache} != {info.cache}")
        if found.grid != info.grid:
            differences.append(f"grid: {found.grid} != {info.grid}")
        if found.num_samples != info.num_samples:
            differences.append(f"training samples: {found.num_samples} != {info.num_samples}")
        elif found.keyframes != info.keyframes:
            differences.append("keyframes: the cache holds others, or has skipped others")
        if found.scenes != info.scenes:
            differences.append(f"list of label scenes: {found.scenes} != {info.scenes}")
        if found.initial != info.initial:
            differences.append(f"initial weights: {found.initial} != {info.initial}")
        if differences and has_checkpoint:
            raise CheckpointError(
                f"{run} holds another run ({'; '.join(differences)} [there != here]): choose another --out, or delete it"
            )
        if has_checkpoint:
            return find_checkpoint(run)
    elif run.exists() and {path.name for path in run.iterdir()} - {LOCK, _PARTIAL}:
        raise CheckpointError(f"{run} is not empty and not a run of occfeat-train: choose another --out")
    run.mkdir(parents=True, exist_ok=True)
    for name in ("log.jsonl", "scenes.txt"):  # of the run that is overwritten
        (run / name).unlink(missing_ok=True)
    partial = run / _PARTIAL
    partial.write_text(json.dumps(info.to_dict(), indent=1))
    flush(partial)
    partial.rename(file)
    return None


def begin_or_resume(out: Path, info: RunInfo, process: Process) -> Checkpoint | None:
    """`begin_run` on rank 0; returns the same checkpoint on all ranks."""
    found = prepare_together(lambda: begin_run(out, info) if process.is_main else None)
    if process.world == 1:
        return found
    message = [None if found is None else str(found.path)]
    dist.broadcast_object_list(message)
    return None if message[0] is None else find_checkpoint(Path(message[0]))

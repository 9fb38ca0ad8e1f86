"""The directory of a run: created for a config, or continued if it holds the same run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from occfeat_targets.cache.records import delete_folder, is_partial, write_file
from occfeat_targets.common.plural import count
from occfeat_train.distributed import Process, prepare_together
from occfeat_train.training.checkpoint import INFO, Checkpoint, RunInfo, checkpoint_folders, find_checkpoint
from occfeat_train.training.run_lock import LOCK
from occfeat_train.training.saving import CheckpointError, first_line, saving

_OWN = {INFO, "log.jsonl", "scenes.txt", "checkpoints", "tensorboard", "evaluation"}


def begin_run(run: Path, info: RunInfo, *, overwrite: bool = False) -> Checkpoint | None:
    """Create RUN for this config, or continue the existing run if its config is the same. Its lock is held.

    A run with a constant learning rate is also continued with more epochs. A run without a checkpoint is overwritten, because
    there is nothing to continue, and any run with `overwrite`. Returns the checkpoint to continue from, or None at the
    beginning. Raises CheckpointError that lists every difference, or if RUN is not a run.
    """
    remove_partial(run)
    if overwrite:
        delete_run(run)
    file = run / INFO
    has_checkpoint = bool(checkpoint_folders(run))
    if file.is_file():
        try:
            found = RunInfo.from_dict(json.loads(file.read_text()))
        except (ValueError, KeyError, TypeError) as err:
            raise CheckpointError(f"{file} can't be used ({first_line(err)}): choose another --out") from err
        differences = _differences(found, info)
        if has_checkpoint and differences:
            _require_extension(run, found, info, differences)
            _write_info(run, info)
        if has_checkpoint:
            return find_checkpoint(run)
    elif not overwrite and run.exists() and {path.name for path in run.iterdir()} - {LOCK}:
        raise CheckpointError(f"{run} is not empty and not a run of occfeat-train: choose another --out")
    for name in ("log.jsonl", "scenes.txt"):  # of the run that is overwritten
        (run / name).unlink(missing_ok=True)
    _write_info(run, info)
    return None


def _differences(found: RunInfo, info: RunInfo) -> list[str]:
    """One line for each thing in which the run that was found differs from this one."""
    differences = found.config.differences(replace(info.config, label_scenes=found.config.label_scenes))
    if found.cache != info.cache:
        differences.append(f"cache fingerprint: {found.cache} != {info.cache}")
    if found.grid != info.grid:
        differences.append(f"grid: {found.grid} != {info.grid}")
    if found.num_samples != info.num_samples:
        differences.append(f"training samples: {found.num_samples} != {info.num_samples}")
    elif found.keyframes != info.keyframes:
        differences.append("keyframes: the cache holds others, or has skipped others")
    if found.scenes != info.scenes:
        rules = (f"{i.scenes} ({i.config.label_scenes.describe()})" for i in (found, info))
        differences.append(f"list of label scenes: {' != '.join(rules)}")
    is_known = bool(found.initial_digest and info.initial_digest)  # the run with these weights may have been moved
    if found.initial_digest != info.initial_digest if is_known else found.initial != info.initial:
        there, here = (f"{i.initial} {i.initial_digest[:12]}".rstrip() for i in (found, info))
        differences.append(f"initial weights: {there} != {here}")
    return differences


def _require_extension(run: Path, found: RunInfo, info: RunInfo, differences: Sequence[str]) -> None:
    """Raises CheckpointError unless the only difference is a larger number of epochs, with a constant learning rate."""
    before, now = found.config.optim, info.config.optim
    if len(differences) > 1 or now.epochs <= before.epochs:
        raise CheckpointError(
            f"{run} holds another run ({'; '.join(differences)} [there != here]): choose another --out, or pass --overwrite to "
            "delete it"
        )
    if before.schedule != "constant":
        raise CheckpointError(
            f"{run} was begun with {count(before.epochs, 'epoch')} of the schedule {before.schedule}, whose learning rate depends on "
            f"their number: it cannot be extended to {now.epochs:g}; start another run from its weights with --from {run}"
        )


def _write_info(run: Path, info: RunInfo) -> None:
    with saving(run / INFO):
        run.mkdir(parents=True, exist_ok=True)
        write_file(run / INFO, json.dumps(info.to_dict(), indent=1).encode())


def remove_partial(run: Path) -> None:
    """Remove what a killed training left: files and checkpoints that were being written or deleted.

    Only names that occur in a run, because this is called before it is known that the directory is one.
    """
    patterns = [*(f".{name}.*" for name in _OWN), "checkpoints/.step-*", "checkpoints/.best.*", "evaluation/.*"]
    for path in [path for pattern in patterns for path in run.glob(pattern) if is_partial(path.name)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def delete_run(run: Path) -> None:
    """Delete what occfeat-train has written to a run's directory, but its lock. Files of others stay.

    Raises CheckpointError, and deletes nothing, if something is there and it is no run.
    """
    there = {path.name for path in run.iterdir()} - {LOCK} if run.is_dir() else set()
    if not there:
        return
    if not (_is_info(run / INFO) or checkpoint_folders(run)):
        raise CheckpointError(
            f"{run} is not a run of occfeat-train, so --overwrite deletes nothing: choose another --out"
        )
    for name in sorted(there & _OWN, key=lambda name: name == INFO):  # last, because it says that this is a run
        path = run / name
        if path.is_dir() and not path.is_symlink():
            delete_folder(path)
        else:
            path.unlink()


def _is_info(file: Path) -> bool:
    try:
        return {"config", "grid", "cache"} <= set(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return False


def begin_or_resume(out: Path, info: RunInfo, process: Process, *, overwrite: bool = False) -> Checkpoint | None:
    """`begin_run` on rank 0; returns the same checkpoint on all ranks."""
    found = prepare_together(lambda: begin_run(out, info, overwrite=overwrite) if process.is_main else None)
    if process.world == 1:
        return found
    message = [None if found is None else str(found.path)]
    dist.broadcast_object_list(message)
    return None if message[0] is None else find_checkpoint(Path(message[0]))

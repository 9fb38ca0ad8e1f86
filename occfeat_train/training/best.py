"""The best checkpoint of a run: RUN/checkpoints/best, a link to the one with the best validation, which is never pruned."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from occfeat_targets.cache.records import delete_folder, sync
from occfeat_train.training.checkpoint import BEST, checkpoint_folder
from occfeat_train.training.log import read_log
from occfeat_train.training.saving import saving


def link_best(run: Path, score: Callable[[Mapping[str, Any]], float | None]) -> None:
    """Let RUN/checkpoints/best point at the checkpoint with the highest score of its validation results in the log.

    The earliest of several equal ones. There is no link before the first validation with a score.
    """
    scores = {
        record["step"] + 1: value
        for record in read_log(run)
        if "validation" in record and (value := score(record["validation"])) is not None
    }
    scores = {step: value for step, value in scores.items() if checkpoint_folder(run, step).is_dir()}
    if not scores:
        return
    link = run / "checkpoints" / BEST
    partial = link.with_name(f".{BEST}.partial")
    with saving(link):
        partial.unlink(missing_ok=True)
        if link.is_dir() and not link.is_symlink():  # a copy of the run that followed links
            delete_folder(link)
        partial.symlink_to(checkpoint_folder(run, max(scores, key=lambda step: scores[step])).name)
        os.replace(partial, link)
        sync(link.parent)

"""A step of a recipe: command lines, the steps that they need, and a file that says that they have succeeded.

A recipe is a list of steps, each after those that it needs. It runs on this machine (`processes.py`) or as batch jobs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["build", "train", "evaluate", "cpu"]


@dataclass(frozen=True)
class Step:
    """One piece of work of a recipe.

    name: unique in the recipe; also that of its log and of its batch job.
    commands: command lines, each a package and its arguments as after `python -m`, run one after the other. The step succeeds if all
    exit with 0. It can be run again at any time, because every command continues what it has begun.
    done: this file exists exactly if the step has succeeded. Whoever runs the step creates it.
    kind: "build" (CPUs, and a GPU for the teacher; its only command is an `occfeat_targets build`, which can be split into shards),
    "train" (GPUs; can be stopped with SIGUSR1 and continued), "evaluate" (one GPU), "cpu".
    after: names of the steps that it needs. samples: keyframes that pass the network, or that are built; for times that are printed.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    done: Path
    kind: Kind
    after: tuple[str, ...] = ()
    samples: int = 0

    @property
    def is_finished(self) -> bool:
        """A result that cannot be read is made again."""
        if self.done.suffix != ".json":
            return self.done.exists()
        try:
            json.loads(self.done.read_bytes())
        except (OSError, ValueError):
            return False
        return True

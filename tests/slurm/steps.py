"""Steps of one command, and stand-ins for programs."""

from __future__ import annotations

from pathlib import Path

from pipelines.steps import Kind, Step

TRAIN = ("occfeat_train", "pretrain", "--out", "a run")
EVALUATE = ("occfeat_train", "evaluate", "a run")
BUILD = ("occfeat_targets", "build", "--split", "train")


def step(name: str, command: tuple[str, ...], folder: Path, kind: Kind, *after: str) -> Step:
    return Step(name, (command,), folder / f"{name}.done", kind, after)


def program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)

"""Runs and checkpoints on disk. Weights are safetensors; the optimiser state is a separate file.

    RUN/config.json                 the resolved config, and the run's cache, grid and initial weights
    RUN/log.jsonl                   one record per step
    RUN/checkpoints/step-00000042/  model.safetensors, config.json, trainer.pt, checkpoint.json
    RUN/checkpoints/best            a link to the checkpoint with the best validation (best.py)

A checkpoint is written under another name, flushed and renamed, so it is complete or absent. Names of what is not complete, or
is being deleted, are those of `is_partial` (records.py); the next training of the run removes it. The two newest and the best are
kept.
checkpoint.json is written last and holds the step and the SHA-256 of the other files, which are verified before a file is
read. An older checkpoint is never used automatically; the error names the newest intact one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.records import (
    CacheError,
    delete_folder,
    digest,
    read_record,
    sync,
    sync_and_digest,
    write_record,
)
from occfeat_targets.common.pickled import load_pickled
from occfeat_train.config import Config
from occfeat_train.training.saving import CheckpointError, first_line, saving

KEEP = 2
BEST = "best"
WEIGHTS, INFO, STATE, RECORD = "model.safetensors", "config.json", "trainer.pt", "checkpoint.json"


@dataclass(frozen=True)
class RunInfo:
    """Description of a run, saved with it and with its checkpoints.

    feature_dim: N_y of the teacher, 0 without a teacher. cache: fingerprint of the targets. num_samples: size of the
    training set, which determines the order of samples. keyframes: hash of their tokens. initial: source of the initial weights,
    a sentence. initial_digest: SHA-256 of their file, if they are those of another run. scenes: hash of the label scenes. simulated: the parts of the data that are not real, from the cache. preset: name of the config's preset,
    before options changed it. targets: the cache's spec. data: source of the cache (paper.py). origin: of the process that wrote
    this (common/provenance.py). parent: the run whose weights it started from. more_targets: the specs of the further caches of a
    pretraining on several, whose fingerprints are joined by "+" in `cache`.
    """

    config: Config
    grid: VoxelGrid
    feature_dim: int
    cache: str
    num_samples: int
    initial: str
    keyframes: str = ""
    initial_digest: str = ""
    scenes: str = ""
    simulated: tuple[str, ...] = ()
    preset: str = ""
    targets: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=dict)
    parent: RunInfo | None = None
    more_targets: tuple[Mapping[str, Any], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        parent = None if self.parent is None else self.parent.to_dict()
        own = asdict(replace(self, parent=None))
        return {**own, "config": self.config.to_dict(), "grid": self.grid.to_dict(), "parent": parent}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunInfo:
        values = dict(data)
        values["config"] = Config.from_dict(values["config"])
        values["grid"] = VoxelGrid.from_dict(values["grid"])
        for name in ("simulated", "more_targets"):
            values[name] = tuple(values.get(name, ()))
        if values.get("parent") is not None:
            values["parent"] = cls.from_dict(values["parent"])
        return cls(**values)

    @property
    def num_steps(self) -> int:
        """Steps of the whole training; 0 for weights that were imported."""
        return self.config.optim.num_steps(self.num_samples) if self.num_samples else 0

    def warnings(self) -> list[str]:
        return [f"SIMULATED: {' and '.join(self.simulated)}"] if self.simulated else []


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    info: RunInfo

    @property
    def step(self) -> int:
        return int(_read_record(self.path)["step"])

    @property
    def is_finished(self) -> bool:
        """Whether the training ended with this checkpoint."""
        return self.step >= self.info.num_steps

    def describe_step(self) -> str:
        """``step 60``, or ``step 3 of 60, unfinished``."""
        return f"step {self.step}" if self.is_finished else f"step {self.step} of {self.info.num_steps}, unfinished"

    @property
    def weights_digest(self) -> str:
        """SHA-256 of the weights' file, from the record."""
        return str(_read_record(self.path)["files"][WEIGHTS])

    def weights(self) -> dict[str, Tensor]:
        """{name: tensor} on the CPU. Raises CheckpointError if the file was changed."""
        file = _sound_file(self.path, WEIGHTS)
        try:
            return load_file(file)
        except (SafetensorError, OSError) as err:
            raise CheckpointError(f"{file} is damaged ({err}): {_advice(self.path)}") from err

    def trainer_state(self) -> dict[str, Any]:
        """Optimiser and schedule. Raises CheckpointError if the file was changed. Code in the file is never executed."""
        file = _sound_file(self.path, STATE)
        try:
            state: dict[str, Any] = load_pickled(file)
        except (OSError, ValueError) as err:
            raise CheckpointError(
                f"{file} holds no trainer state that can be loaded safely ({first_line(err)}): {_advice(self.path)}"
            ) from err
        return state


def checkpoint_folders(run: Path) -> list[Path]:
    """Checkpoint folders, intact or not, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"))


def _read_record(folder: Path) -> dict[str, Any]:
    """A checkpoint's record. Raises CheckpointError if it is lost, damaged, or its step does not match the folder's name."""
    try:
        record = read_record(folder / RECORD)
    except CacheError:
        raise CheckpointError(f"{folder / RECORD} is missing or damaged: {_advice(folder)}") from None
    if folder.name.startswith("step-") and folder.name != _folder_name(record["step"]):
        raise CheckpointError(f"{folder} holds step {record['step']}: rename it to {_folder_name(record['step'])}")
    return record


def _sound_file(folder: Path, name: str) -> Path:
    """A file of a checkpoint. Raises CheckpointError if it is lost or was changed."""
    expected, file = _read_record(folder)["files"][name], folder / name
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: {_advice(folder)}")
    if digest(file) != expected:
        raise CheckpointError(f"{file} is damaged, its SHA-256 is not the one in {RECORD}: {_advice(folder)}")
    return file


def _advice(folder: Path) -> str:
    """What to do about a damaged checkpoint: names the newest intact checkpoint of its run."""
    for older in [p for p in checkpoint_folders(folder.parent.parent)[::-1] if p.name < folder.name]:
        try:
            for name in (WEIGHTS, INFO, STATE):
                _sound_file(older, name)
        except CheckpointError:
            continue
        return f"{older} is intact; pass that one, or delete {folder} to continue from it"
    return f"no older checkpoint of its run is intact; delete {folder.parent.parent}, and train again"


def _folder_name(step: int) -> str:
    return f"step-{step:08d}"


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / _folder_name(step)


def save_checkpoint(
    run: Path, step: int, info: RunInfo, weights: Mapping[str, Tensor], state: Mapping[str, Any]
) -> Path:
    """Write RUN/checkpoints/step-N atomically, and delete all but the two newest and the best.

    Raises CheckpointError on weights that are not finite and on a full disk; earlier checkpoints are kept.
    """
    final = checkpoint_folder(run, step)
    folder = final.parent
    require_finite(weights, f"the weights after step {step} are not saved", "the run diverged: lower the learning rate")
    draft = folder / f".{final.name}.partial"
    with saving(final):
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, draft / WEIGHTS)
        (draft / INFO).write_text(json.dumps(info.to_dict(), indent=1))
        with (draft / STATE).open("wb") as file:
            torch.save(dict(state), file)
        files = {name: sync_and_digest(draft / name) for name in (WEIGHTS, INFO, STATE)}
        write_record(draft / RECORD, {"step": step, "files": files})
        if final.exists():
            delete_folder(final)
        draft.rename(final)
        sync(folder)
        best = best_step(run)
        for old in checkpoint_folders(run)[:-KEEP]:
            if best is None or old.name != _folder_name(best):
                delete_folder(old)
    return final


def best_step(run: Path) -> int | None:
    """Step of RUN/checkpoints/best; None if there is none that can be read."""
    try:
        return int(read_record(run / "checkpoints" / BEST / RECORD)["step"])
    except CacheError:
        return None


def find_checkpoint(path: Path) -> Checkpoint:
    """The newest checkpoint of a run directory, or the checkpoint whose directory or link is given.

    Raises CheckpointError if there is none, or if its record or config is damaged.
    """
    path = Path(path)
    if path.is_symlink() and path.name == BEST:
        path = path.parent / path.readlink()
    if path.is_file():
        raise CheckpointError(
            f"{path} is a file: a run or checkpoint directory of occfeat-train is expected (one with {WEIGHTS} and {INFO})"
        )
    is_checkpoint = (path / RECORD).is_file() or (path / WEIGHTS).is_file()
    folders = [path] if is_checkpoint else checkpoint_folders(path)[::-1]
    if not folders:
        raise CheckpointError(
            f"no checkpoint in {path}: a run directory of occfeat-train pretrain or finetune is expected"
            + (f"; only runs with --validate have {BEST}" if path.name == BEST else "")
        )
    try:
        file = _sound_file(folders[0], INFO)
    except CheckpointError:
        if is_checkpoint or folders[0].is_dir():
            raise
        return find_checkpoint(path)  # a training has replaced it meanwhile
    try:
        info = RunInfo.from_dict(json.loads(file.read_text()))
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise CheckpointError(f"{file} can't be used ({first_line(err)}): use another checkpoint") from err
    return Checkpoint(folders[0], info)


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], source: Path, *, only: str = "") -> None:
    """Load weights into a module; names and shapes must match exactly.

    only: a prefix; tensors with other names (another head) are left out. Raises CheckpointError that names the tensors that
    differ or are not finite.
    """
    wanted = {name: t for name, t in module.state_dict().items() if name.startswith(only)}
    found = {name: t for name, t in weights.items() if name.startswith(only)}
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} is not of this network" for name in found if name not in wanted]
    problems += [
        f"{name} is {tuple(found[name].shape)}, {tuple(t.shape)} expected"
        for name, t in wanted.items()
        if name in found and found[name].shape != t.shape
    ]
    if problems:
        shown = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise CheckpointError(
            f"{source} does not fit this network: {shown}: use the preset or options it was trained with"
        )
    require_finite(found, f"{source} can't be used", "use another checkpoint")
    module.load_state_dict(found, strict=False)


def require_finite(weights: Mapping[str, Tensor], what: str, remedy: str) -> None:
    """Raises CheckpointError that names the tensors with an infinity or a NaN."""
    bad = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if bad:
        shown = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
        raise CheckpointError(f"{what}: {shown} of {len(weights)} tensors are not finite: {remedy}")

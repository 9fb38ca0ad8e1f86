"""A run on disk, and its checkpoints: weights that anybody can open, the trainer's state apart.

    RUN/config.json                 the resolved config, and what the run was given (cache, grid, initial weights)
    RUN/log.jsonl                   one record a step
    RUN/checkpoints/step-00000042/  model.safetensors, config.json, trainer.pt, checkpoint.json

A checkpoint is written under another name, flushed and renamed, so it is whole or not there; the two newest are kept.
Its record, checkpoint.json, is written last and holds its step and the SHA-256 of the other files. A file is compared with
it before it is read. Nothing falls back to an older checkpoint by itself: the error names the one that is whole.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.records import CacheError, digest, read_record, sync_and_digest, write_record
from occfeat_train.config import Config

KEEP = 2
WEIGHTS, INFO, STATE, RECORD = "model.safetensors", "config.json", "trainer.pt", "checkpoint.json"


class CheckpointError(ValueError):
    """A checkpoint or run directory that is absent, damaged or of another kind; the message says what to do."""


@dataclass(frozen=True)
class RunInfo:
    """What a checkpoint is of. feature_dim: N_y of the teacher, 0 without. cache: fingerprint of the targets.

    num_samples: of the training set, which fixes the order of samples. keyframes: hash of which they are. initial: where the weights came from, a sentence.
    scenes: hash of the label scenes. simulated: what in it is not real, from the cache.
    preset: the config's, before options changed it. targets: the cache's spec. data: what it was built from (paper.py).
    parent: the run whose weights it started from.
    """

    config: Config
    grid: VoxelGrid
    feature_dim: int
    cache: str
    num_samples: int
    initial: str
    keyframes: str = ""
    scenes: str = ""
    simulated: tuple[str, ...] = ()
    preset: str = ""
    targets: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    parent: RunInfo | None = None

    def to_dict(self) -> dict[str, Any]:
        parent = None if self.parent is None else self.parent.to_dict()
        own = asdict(replace(self, parent=None))
        return {**own, "config": self.config.to_dict(), "grid": self.grid.to_dict(), "parent": parent}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunInfo:
        values = dict(data)
        values["config"] = Config.from_dict(values["config"])
        values["grid"] = VoxelGrid.from_dict(values["grid"])
        values["simulated"] = tuple(values["simulated"])
        if values.get("parent") is not None:
            values["parent"] = cls.from_dict(values["parent"])
        return cls(**values)

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
    def weights_digest(self) -> str:
        """SHA-256 of the weights' file, from the record."""
        return str(_read_record(self.path)["files"][WEIGHTS])

    def weights(self) -> dict[str, Tensor]:
        """{name: tensor} on the CPU. Raises CheckpointError if a byte of the file changed."""
        file = _sound_file(self.path, WEIGHTS)
        try:
            return load_file(file)
        except (SafetensorError, OSError) as err:
            raise CheckpointError(f"{file} is damaged ({err}): {_advice(self.path)}") from err

    def trainer_state(self) -> dict[str, Any]:
        """Optimiser and schedule. Raises CheckpointError if a byte of the file changed; runs no code that it might hold."""
        file = _sound_file(self.path, STATE)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of a pickle's protocol; what can't be read is an error
                return torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as err:
            raise CheckpointError(
                f"{file} holds no trainer state that can be loaded safely ({_first_line(err)}): {_advice(self.path)}"
            ) from err


def _read_record(folder: Path) -> dict[str, Any]:
    """A checkpoint's record. Raises CheckpointError if it is lost, damaged, or of another step than its folder's name."""
    try:
        record = read_record(folder / RECORD)
    except CacheError:
        raise CheckpointError(f"{folder / RECORD} is missing or damaged: {_advice(folder)}") from None
    if folder.name.startswith("step-") and folder.name != _folder_name(record["step"]):
        raise CheckpointError(f"{folder} holds step {record['step']}: rename it to {_folder_name(record['step'])}")
    return record


def _sound_file(folder: Path, name: str) -> Path:
    """A file of a checkpoint. Raises CheckpointError if it is lost or a byte of it changed."""
    expected, file = _read_record(folder)["files"][name], folder / name
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: {_advice(folder)}")
    if digest(file) != expected:
        raise CheckpointError(f"{file} is damaged, its SHA-256 is not the one in {RECORD}: {_advice(folder)}")
    return file


def _advice(folder: Path) -> str:
    """What to do about a checkpoint that is damaged: which older one of its run is whole."""
    for older in [p for p in _steps(folder.parent.parent)[::-1] if p.name < folder.name]:
        try:
            for name in (WEIGHTS, INFO, STATE):
                _sound_file(older, name)
        except CheckpointError:
            continue
        return f"{older} is whole; name that one, or delete {folder} to continue from it"
    return "no older checkpoint of its run is whole; start a new run"


def _folder_name(step: int) -> str:
    return f"step-{step:08d}"


def save_checkpoint(
    run: Path, step: int, info: RunInfo, weights: Mapping[str, Tensor], state: Mapping[str, Any]
) -> Path:
    """Write RUN/checkpoints/step-N, atomically, and drop all but the newest ones.

    Raises CheckpointError on weights that are not finite, and OSError on a full disk; earlier checkpoints stay.
    """
    folder = run / "checkpoints"
    final = folder / _folder_name(step)
    require_finite(weights, f"the weights after step {step} are not saved", "the run diverged: lower the learning rate")
    draft = folder / f".{final.name}.partial"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, draft / WEIGHTS)
    (draft / INFO).write_text(json.dumps(info.to_dict(), indent=1))
    torch.save(dict(state), draft / STATE)
    files = {name: sync_and_digest(draft / name) for name in (WEIGHTS, INFO, STATE)}
    write_record(draft / RECORD, {"step": step, "files": files})
    shutil.rmtree(final, ignore_errors=True)
    draft.rename(final)
    _flush(folder)
    for old in _steps(run)[:-KEEP]:
        shutil.rmtree(old)
    return final


def find_checkpoint(path: Path) -> Checkpoint:
    """The newest checkpoint of a run directory, or the checkpoint directory itself.

    Raises CheckpointError if there is none, saying what was found instead, or if its record or config are damaged.
    """
    path = Path(path)
    if path.is_file():
        raise CheckpointError(
            f"{path} is a file: a run or checkpoint directory of occfeat-train is expected (one with {WEIGHTS} and {INFO})"
        )
    is_checkpoint = (path / RECORD).is_file() or (path / WEIGHTS).is_file()
    folders = [path] if is_checkpoint else _steps(path)[::-1]
    if not folders:
        raise CheckpointError(
            f"no checkpoint in {path}: a directory that occfeat-train pretrain or finetune made is expected"
        )
    file = _sound_file(folders[0], INFO)
    try:
        info = RunInfo.from_dict(json.loads(file.read_text()))
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise CheckpointError(f"{file} can't be used ({_first_line(err)}): use another checkpoint") from err
    return Checkpoint(folders[0], info)


def latest_checkpoint(run: Path) -> Checkpoint | None:
    """The newest checkpoint of a run, None if it has none yet."""
    return find_checkpoint(run) if _steps(run) else None


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], source: Path, *, only: str = "") -> None:
    """Load weights into a module, every one of them, exactly.

    only: a prefix; what doesn't start with it (another head) is left out. Raises CheckpointError naming what differs, or
    what is not finite.
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
            f"{source} does not fit this network: {shown}: choose the preset or options it was trained with"
        )
    require_finite(found, f"{source} can't be used", "use another checkpoint")
    module.load_state_dict(found, strict=False)


def require_finite(weights: Mapping[str, Tensor], what: str, remedy: str) -> None:
    """Raises CheckpointError naming the tensors that hold an infinity or a NaN."""
    bad = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if bad:
        shown = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
        raise CheckpointError(f"{what}: {shown} of {len(weights)} tensors are not finite: {remedy}")


def begin_run(run: Path, info: RunInfo) -> Checkpoint | None:
    """Claim RUN for this config, or continue the run that stands there if it is the same.

    A run that never began training (it has no log) gives way to any config. Returns the checkpoint to continue from, None
    at the beginning. Raises CheckpointError naming every difference.
    """
    file = run / INFO
    if file.is_file():
        try:
            found = RunInfo.from_dict(json.loads(file.read_text()))
        except (ValueError, KeyError, TypeError) as err:
            raise CheckpointError(f"{file} can't be used ({_first_line(err)}): choose another --out") from err
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
        if differences and ((run / "log.jsonl").exists() or _steps(run)):
            raise CheckpointError(
                f"{run} holds another run ({'; '.join(differences)} [there != here]): choose another --out, or delete it"
            )
        if not differences:
            return latest_checkpoint(run)
    elif run.exists() and any(run.iterdir()):
        raise CheckpointError(f"{run} holds something that is no run of occfeat-train: choose another --out")
    run.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(info.to_dict(), indent=1))
    _flush(partial)
    partial.rename(file)
    return None


def _steps(run: Path) -> list[Path]:
    """Checkpoint folders, whole or not, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first_line(err: BaseException) -> str:
    return (str(err).strip() or type(err).__name__).splitlines()[0]

"""The stages pretrain, finetune and evaluate.

Each opens the caches, checks everything that can be checked before the first step, prints a summary, and calls the loop.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from occfeat_targets.cache.reader import CacheReader
from occfeat_train.config import FIXED, MEANING, Config
from occfeat_train.data.dataset import KeyframeDataset
from occfeat_train.data.frames import resolve_frame
from occfeat_train.data.label_scenes import label_scenes, read_scenes
from occfeat_train.distributed import Process, prepare_together
from occfeat_train.networks.encoder import DEFAULT_WEIGHTS, load_backbone_weights
from occfeat_train.tasks.base import Task
from occfeat_train.tasks.build import build_task, count_parameters
from occfeat_train.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    RunInfo,
    begin_run,
    find_checkpoint,
    load_weights,
)
from occfeat_train.training.evaluate import evaluate
from occfeat_train.training.loop import LoopOptions, train
from occfeat_train.training.paper import DATA, describe_data

PrintLine = Callable[[str], None]


@dataclass(frozen=True)
class RunOptions:
    """Inputs and outputs of a stage. cache: directory of caches. validate: split to evaluate at every checkpoint, or None."""

    cache: Path
    split: str
    out: Path
    validate: str | None = None
    loop: LoopOptions = field(default_factory=LoopOptions)


def run_training(
    config: Config,
    run_options: RunOptions,
    process: Process,
    print_line: PrintLine,
    *,
    initial: Path | None = None,
    scenes_file: Path | None = None,
    preset: str = "",
) -> bool:
    """Pretrain or finetune (`config.task`) to the end or until a signal, or continue the run in run_options.out.

    initial: a run or checkpoint with the initial weights of the network, and of the head if its task is the same.
    scenes_file: names of the label scenes, one per line, instead of config.labels. preset: name of the config's preset, for
    the report. Returns whether the run is finished.
    """
    ready = prepare_together(lambda: prepare(config, run_options, print_line, initial, scenes_file, preset))
    info, dataset, held_out, scenes = ready.info, ready.dataset, ready.held_out, ready.scenes
    config, cache = info.config, dataset.reader.cache
    task = build_task(config, info.grid, info.feature_dim)
    resume = begin_or_resume(run_options.out, info, process)
    if resume is None:
        print_line(prepare_together(lambda: load_initial(task, config, ready.start)))
    if scenes is not None:
        without = list(dict.fromkeys(scene for scene in cache.identity.scenes if scene not in ready.usable))
        note = f"; {len(without)} more have no valid keyframe: {', '.join(without)}" if without else ""
        print_line(
            f"labels: {len(scenes)} of {len(ready.usable)} scenes, listed in {run_options.out / 'scenes.txt'}{note}"
        )
        if process.is_main:
            lines = [*scenes, *(f"# no valid keyframe: {name}" for name in without)]
            (run_options.out / "scenes.txt").write_text("".join(f"{line}\n" for line in lines))
    print_summary(task, info, dataset, run_options, process, resume, print_line)
    validate = None
    if held_out is not None:

        def validate(task: Task) -> dict[str, Any]:
            metric = evaluate(task, held_out, process, workers=run_options.loop.workers, progress=False)
            return dict(metric.results())

    return train(task, info, dataset, run_options.out, process, resume, run_options.loop, validate)


@dataclass(frozen=True)
class TrainingSetup:
    """Inputs of a training, opened on every rank.

    scenes: scenes whose labels are used, None without labels. usable: scenes with a valid keyframe. start: checkpoint with the
    initial weights.
    """

    info: RunInfo
    dataset: KeyframeDataset
    held_out: KeyframeDataset | None
    scenes: list[str] | None
    usable: list[str]
    start: Checkpoint | None


def prepare(
    config: Config,
    run_options: RunOptions,
    print_line: PrintLine,
    initial: Path | None,
    scenes_file: Path | None,
    preset: str,
) -> TrainingSetup:
    """Open caches and initial checkpoint, and check that they match each other and the config. Raises ValueError."""
    reader = open_reader(run_options.cache, run_options.split)
    cache, spec = reader.cache, reader.cache.spec
    for line in cache.warnings:
        print_line(line)
    config = replace(config, frame=resolve_frame(spec.frames, config.frame))
    scenes = None
    usable = list(
        dict.fromkeys(s for s, is_valid in zip(cache.identity.scenes, reader.is_valid, strict=True) if is_valid)
    )
    if not config.is_pretext:
        scenes = read_scenes(scenes_file, usable) if scenes_file else label_scenes(usable, config.labels)
    dataset = KeyframeDataset(reader, config, training=True, scenes=scenes)
    feature_dim = spec.teacher.dim if spec.teacher is not None else 0
    held_out = None
    if run_options.validate is not None:
        held_out = KeyframeDataset(open_reader(run_options.cache, run_options.validate), config, training=False)
        require_same_grid(held_out, dataset.grid, f"the {run_options.split} split")
        require_same_features(held_out, feature_dim, f"the {run_options.split} split")
    start = find_checkpoint(initial) if initial is not None else None
    if start is not None:
        for line in changes_of_meaning(dataset, start):
            print_line(line)
    for line in notes_on_data(dataset):
        print_line(line)
    info = RunInfo(
        config=config,
        grid=spec.grid,
        feature_dim=feature_dim,
        cache=spec.fingerprint,
        num_samples=len(dataset),
        keyframes=dataset.digest,
        initial=describe_initial(config, start),
        scenes=hashlib.sha256("\n".join(scenes or []).encode()).hexdigest()[:16],
        simulated=tuple(cache.simulated),
        preset=preset,
        targets=spec.to_dict(),
        data={
            **describe_data(cache.provenance, int(reader.is_valid.sum())),
            "label scenes": "from a list" if scenes_file else DATA["label scenes"],
            "simulated": " and ".join(cache.simulated) or DATA["simulated"],
        },
        parent=None if start is None else start.info,
    )
    return TrainingSetup(info, dataset, held_out, scenes, usable, start)


def changes_of_meaning(dataset: KeyframeDataset, start: Checkpoint) -> list[str]:
    """A line for each field of MEANING that differs from the checkpoint's training, and for a different teacher.

    Raises CheckpointError if the weights do not fit the changed field.
    """
    here, there = dataset.config.flat(), start.info.config.flat()
    changed = [name for name in MEANING if here[name] != there[name]]
    for name in changed:
        if name in FIXED:
            raise CheckpointError(
                f"{name}={here[name]}: the network of {start.path} was trained with {there[name]}, and its weights fit "
                "no other value: leave that option or preset out, or train without --from"
            )
    lines = [
        f"{name}={here[name]} overrides {there[name]}, which the network of {start.path} was trained with"
        for name in changed
    ]
    ours, theirs = (t.get("teacher") or {} for t in (dataset.reader.cache.spec.to_dict(), start.info.targets))
    same = all(ours.get(name) == value for name, value in theirs.items() if name not in ("name", "dtype"))
    if "features" in dataset.arrays and not same:
        lines.append(f"another teacher: the cache's features are {ours}, the head of {start.path} predicts {theirs}")
    return lines


def notes_on_data(dataset: KeyframeDataset) -> list[str]:
    """A line for each thing that a user should know of the cache's keyframes as they are used."""
    reader, lines = dataset.reader, []
    skipped = len(reader) - int(reader.is_valid.sum())
    if skipped:
        lines.append(
            f"{skipped} of {len(reader)} keyframes of {reader.cache.path} were skipped by its build and are left out"
        )
    if dataset.enlarges:
        size = "x".join(map(str, reader.cache.spec.image_size))
        lines.append(f"the cache's images of {size} are enlarged (allow_upsampling)")
    return lines


def run_evaluation(
    path: Path,
    run_options: RunOptions,
    process: Process,
    print_line: PrintLine,
    *,
    batch: int,
    frame: str | None = None,
) -> dict[str, Any]:
    """Evaluate a run's newest checkpoint on a whole split. Writes the results to run_options.out/SPLIT.json and returns them."""
    checkpoint, dataset, task = prepare_together(lambda: prepare_evaluation(path, run_options, frame))
    info, config, reader = checkpoint.info, dataset.config, dataset.reader
    for line in changes_of_meaning(dataset, checkpoint):
        print_line(line)
    warnings = list(dict.fromkeys([*reader.cache.warnings, *info.warnings()]))
    for line in warnings:
        print_line(line)
    for line in notes_on_data(dataset):
        print_line(line)
    skipped = len(reader) - int(reader.is_valid.sum())
    print_line(
        f"{checkpoint.path}: {info.config.task}, {len(dataset)} samples of {reader.cache.path}, on {process.device}"
    )
    began = time.perf_counter()
    metric = evaluate(
        task, dataset, process, batch=batch, workers=run_options.loop.workers, progress=run_options.loop.progress
    )
    results = {
        "checkpoint": str(checkpoint.path), "task": config.task, "split": run_options.split,
        **measured(checkpoint, dataset), "skipped": skipped, "simulated": warnings, **metric.results(),
    }  # fmt: skip
    for line in metric.lines():
        print_line(line)
    print_line(f"{len(dataset) / (time.perf_counter() - began):.3g} samples/s")
    if process.is_main:
        run_options.out.mkdir(parents=True, exist_ok=True)
        file = run_options.out / f"{run_options.split}.json"
        file.write_text(json.dumps(results, indent=1))
        print_line(f"written to {file}")
    return results


def measured(checkpoint: Checkpoint, dataset: KeyframeDataset) -> dict[str, Any]:
    """Which weights were measured on what: results with other values are not of this checkpoint on this cache."""
    return {
        "step": checkpoint.step,
        "weights": checkpoint.weights_digest,
        "cache": dataset.reader.cache.spec.fingerprint,
        "keyframes": dataset.digest,
        "frames": list(dataset.frames),
        "enlarged": dataset.enlarges,
    }


def prepare_evaluation(
    path: Path, run_options: RunOptions, frame: str | None
) -> tuple[Checkpoint, KeyframeDataset, Task]:
    """A run's newest checkpoint, the split in the run's frame or in `frame`, and the task. Raises ValueError."""
    checkpoint = find_checkpoint(path)
    info = checkpoint.info
    config = info.config if frame is None else replace(info.config, frame=frame)
    dataset = KeyframeDataset(open_reader(run_options.cache, run_options.split), config, training=False)
    require_same_grid(dataset, info.grid, str(checkpoint.path))
    require_same_features(dataset, info.feature_dim, str(checkpoint.path))
    return checkpoint, dataset, restore(checkpoint, config)


def open_reader(cache: Path, split: str) -> CacheReader:
    """Raises CacheError if the cache is absent, unfinished or damaged."""
    return CacheReader(cache / f"{split}.zarr")


def require_same_grid(dataset: KeyframeDataset, grid: Any, of: str) -> None:
    if dataset.grid != grid:
        raise CheckpointError(
            f"{dataset.reader.cache.path} has the grid {dataset.grid}, {of} has {grid}: build a cache with that grid, or use another run"
        )


def require_same_features(dataset: KeyframeDataset, dim: int, of: str) -> None:
    teacher = dataset.reader.cache.spec.teacher
    if "features" in dataset.arrays and teacher is not None and teacher.dim != dim:
        raise CheckpointError(
            f"{dataset.reader.cache.path} has features of {teacher.dim} channels ({teacher.name}), {of} has {dim}: build a "
            "cache with the same teacher, or use another run"
        )


def describe_initial(config: Config, start: Checkpoint | None) -> str:
    if start is not None:
        return f"{start.path.resolve()} ({start.info.config.task})"
    return f"backbone weights: {backbone_weights(config)}"


def backbone_weights(config: Config) -> str:
    name = config.network.weights
    return DEFAULT_WEIGHTS[config.network.backbone] if name == "default" else name


def load_initial(task: Task, config: Config, start: Checkpoint | None) -> str:
    """Load the initial weights of a run. Returns a sentence that names their source."""
    if start is None:
        return load_backbone_weights(task.network.encoder, backbone_weights(config))
    if start.info.grid != task.grid:
        raise CheckpointError(
            f"{start.path} was trained on the grid {start.info.grid}, this cache has {task.grid}: build a cache with that grid"
        )
    same_head = start.info.config.task == config.task
    load_weights(task, start.weights(), start.path, only="" if same_head else "network.")
    return f"network{' and head' * same_head} from {start.path} ({start.info.config.task}, step {start.step})"


def restore(checkpoint: Checkpoint, config: Config | None = None) -> Task:
    """The task of a checkpoint with its weights."""
    info = checkpoint.info
    task = build_task(config or info.config, info.grid, info.feature_dim)
    load_weights(task, checkpoint.weights(), checkpoint.path)
    return task


def begin_or_resume(out: Path, info: RunInfo, process: Process) -> Checkpoint | None:
    """`begin_run` on rank 0; returns the same checkpoint on all ranks."""
    found = prepare_together(lambda: begin_run(out, info) if process.is_main else None)
    if process.world == 1:
        return found
    message = [None if found is None else str(found.path)]
    dist.broadcast_object_list(message)
    return None if message[0] is None else find_checkpoint(Path(message[0]))


def print_summary(
    task: Task,
    info: RunInfo,
    dataset: KeyframeDataset,
    run_options: RunOptions,
    process: Process,
    resume: Checkpoint | None,
    print_line: PrintLine,
) -> None:
    config, optim = info.config, info.config.optim
    spec = dataset.reader.cache.spec
    read = sum(array.nbytes for array in spec.arrays() if array.name in dataset.arrays)
    steps = optim.num_steps(len(dataset))
    batch = f"{optim.batch}" + (f" x {optim.accumulation} accumulated" if optim.accumulation > 1 else "")
    parameters = count_parameters(task)
    size = f"{config.network.image_size[0]}x{config.network.image_size[1]}"
    print_line(
        f"{config.task}: {config.network.lifting} {config.network.backbone}, {parameters:,} parameters "
        f"({count_parameters(task.head):,} of them the head's), images {size}, grid {info.grid}"
    )
    print_line(
        f"{len(dataset):,} samples ({read / 1e6:.1f} MB each), {optim.epochs:g} epochs, {steps:,} steps of {batch}; "
        f"{optim.optimizer} {optim.schedule} lr {optim.lr:g}, on {process.world} x {process.device.type}"
    )
    print_line(
        f"checkpoints of {parameters * 12 / 1e6:.0f} MB in {run_options.out / 'checkpoints'}, the newest two are kept"
    )
    if resume is not None:
        print_line(
            f"continuing at step {resume.step} of {steps}"
            if resume.step < steps
            else f"finished already, at step {steps}"
        )

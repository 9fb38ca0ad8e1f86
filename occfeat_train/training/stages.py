"""The stages pretrain, finetune and evaluate.

Each opens the caches, checks everything that can be checked before the first step, prints a summary, and calls the loop.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.cache.records import write_file
from occfeat_targets.common.plural import count
from occfeat_targets.common.provenance import describe_origin
from occfeat_train.config import Config
from occfeat_train.data.dataset import KeyframeDataset
from occfeat_train.data.label_scenes import label_scenes, read_scenes, resolve_order
from occfeat_train.data.mixture import MixedDataset, Samples, parts_of, resolve_common_frame
from occfeat_train.distributed import Process, gpu_names, prepare_together
from occfeat_train.tasks.base import Task
from occfeat_train.tasks.build import build_task, count_parameters
from occfeat_train.training.checkpoint import Checkpoint, RunInfo, find_checkpoint
from occfeat_train.training.compatibility import (
    changes_of_meaning,
    measured,
    notes_on_data,
    require_fit,
    require_teacher,
)
from occfeat_train.training.evaluate import evaluate
from occfeat_train.training.initial import describe_initial, find_initial, load_initial, restore
from occfeat_train.training.loop import LoopOptions, train
from occfeat_train.training.memory import explains_memory, training_remedy
from occfeat_train.training.paper import DATA, LISTED, describe_data, describe_mixture
from occfeat_train.training.precision import forbid_tf32, note_on_precision, require_precision
from occfeat_train.training.run_directory import begin_or_resume
from occfeat_train.training.run_lock import locked_run
from occfeat_train.training.saving import saving

PACKAGES = ("numpy", "zarr", "torch", "triton", "transformers")  # whose versions are saved with a run and with results


@dataclass(frozen=True)
class RunOptions:
    """Inputs and outputs of a stage.

    cache: directory of caches. validate: split to evaluate at every checkpoint, or None. initial: a run or checkpoint with the
    initial weights of the network, and of the head if its task is the same. scenes_file: names of the label scenes, one per
    line, instead of config.labels. preset: name of the config's preset, for the report. allow_unfinished: whether `initial` may
    be a run that has not finished. overwrite: delete the run in `out`, instead of continuing it. more_caches: further
    directories whose split a pretraining mixes in; `validate` is a split of `cache`.
    """

    cache: Path
    split: str
    out: Path
    validate: str | None = None
    loop: LoopOptions = field(default_factory=LoopOptions)
    initial: Path | None = None
    scenes_file: Path | None = None
    preset: str = ""
    allow_unfinished: bool = False
    overwrite: bool = False
    more_caches: tuple[Path, ...] = ()


@dataclass(frozen=True)
class TrainingSetup:
    """Inputs of a training, opened on every rank.

    scenes: scenes whose labels are used, None without labels. usable: scenes with a valid keyframe. start: checkpoint with the
    initial weights.
    """

    info: RunInfo
    dataset: Samples
    held_out: KeyframeDataset | None
    scenes: list[str] | None
    usable: list[str]
    start: Checkpoint | None


def run_training(config: Config, options: RunOptions, process: Process) -> bool:
    """Train `config.task` to the end or until a signal, or continue the run in options.out. Returns whether it is finished.

    Raises CheckpointError if another training writes to options.out, and MemoryShortage if the GPU has too little memory. Both
    are a ValueError.
    """
    ready = prepare_together(lambda: prepare(config, options, process))
    with locked_run(options.out, process):
        return train_run(ready, options, process)


def train_run(ready: TrainingSetup, options: RunOptions, process: Process) -> bool:
    """Train, or continue, the run in options.out, whose lock is held. Returns whether it is finished."""
    info, config, held_out = ready.info, ready.info.config, ready.held_out
    task = build_task(config, info.grid, info.feature_dim)
    resume = begin_or_resume(options.out, info, process, overwrite=options.overwrite)
    if resume is None:
        process.print(prepare_together(lambda: load_initial(task, config, ready.start)))
    if ready.scenes is not None:
        record_scenes(ready.scenes, ready, options.out, process)
    process.print(*summary(task, ready, options, process, resume), *note_on_precision(config.precision, process.device))
    forbid_tf32(config.precision, process.device)
    validate = None
    if held_out is not None:

        def validate(task: Task) -> dict[str, Any]:
            metric = evaluate(task, held_out, process, workers=options.loop.workers, progress=False)
            return dict(metric.results())

    with explains_memory(process.device, "in training", training_remedy(config, process.world)):
        return train(task, info, ready.dataset, options.out, process, resume, options.loop, validate)


def prepare(config: Config, options: RunOptions, process: Process) -> TrainingSetup:
    """Open caches and initial checkpoint, and check that they match each other, the config and the device. Raises ValueError."""
    require_precision(config.precision, process.device)
    reader, *others = readers = open_readers(config, options)
    cache, spec = reader.cache, reader.cache.spec
    process.print(*dict.fromkeys(line for each in readers for line in each.cache.warnings))
    config = resolve_common_frame(readers, config)
    usable = [scene for scene, is_valid in zip(cache.identity.scenes, reader.is_valid, strict=True) if is_valid]
    usable = list(dict.fromkeys(usable))
    scenes, listed = None, options.scenes_file
    if not config.is_pretext and listed is not None:
        scenes = read_scenes(listed, usable)
    elif not config.is_pretext:
        config, notes = resolve_order(cache, config)
        process.print(*notes)
        scenes = label_scenes(cache, usable, config)
    dataset: Samples = (
        MixedDataset(readers, config) if others else KeyframeDataset(reader, config, training=True, scenes=scenes)
    )
    for part in parts_of(dataset):
        require_teacher(config, part)
    feature_dim = spec.teacher.dim if spec.teacher is not None else 0
    held_out = None
    if options.validate is not None:
        held_out = KeyframeDataset(open_reader(options.cache, options.validate), config, training=False)
        require_fit(held_out, dataset.grid, feature_dim, f"the {options.split} split")
    initial, allowed = options.initial, options.allow_unfinished
    start = find_initial(initial, allow_unfinished=allowed) if initial is not None else None
    if start is not None and options.overwrite and start.path.resolve().is_relative_to(options.out.resolve()):
        raise ValueError(f"--overwrite would delete {options.out}, which --from starts from: choose another --out")
    if start is not None:
        process.print(*dict.fromkeys(line for part in parts_of(dataset) for line in changes_of_meaning(part, start)))
    for part in parts_of(dataset):
        process.print(*notes_on_data(part))
    simulated = tuple(dict.fromkeys(what for each in readers for what in each.cache.simulated))
    info = RunInfo(
        config=config,
        grid=spec.grid,
        feature_dim=feature_dim,
        cache="+".join(each.cache.spec.fingerprint for each in readers),
        num_samples=len(dataset),
        keyframes=dataset.digest,
        initial=describe_initial(config, start),
        initial_digest="" if start is None else start.weights_digest,
        scenes=hashlib.sha256("\n".join(scenes or []).encode()).hexdigest()[:16],
        simulated=simulated,
        preset=options.preset,
        targets=spec.to_dict(),
        data={
            **describe_mixture([describe_data(r.cache.provenance, int(r.is_valid.sum())) for r in readers]),
            "label scenes": LISTED if listed else config.label_scenes.describe(),
            "simulated": " and ".join(simulated) or DATA["simulated"],
        },
        more_targets=tuple(each.cache.spec.to_dict() for each in others),
        origin=describe_origin(PACKAGES, gpu_names(process)),
        parent=None if start is None else start.info,
    )
    return TrainingSetup(info, dataset, held_out, scenes, usable, start)


def record_scenes(scenes: list[str], ready: TrainingSetup, out: Path, process: Process) -> None:
    """Print the number of label scenes, and write their names to out/scenes.txt."""
    everything = dict.fromkeys(parts_of(ready.dataset)[0].reader.cache.identity.scenes)
    without = [scene for scene in everything if scene not in ready.usable]
    note = f"; {count(len(without), 'more scene')} without a valid keyframe: {', '.join(without)}" if without else ""
    how = "" if len(scenes) == len(ready.usable) else f" ({ready.info.data['label scenes']})"
    process.print(f"labels: {len(scenes)} of {len(ready.usable)} scenes{how}, listed in {out / 'scenes.txt'}{note}")
    if process.is_main:
        lines = [*scenes, *(f"# no valid keyframe: {name}" for name in without)]
        with saving(out / "scenes.txt"):
            write_file(out / "scenes.txt", "".join(f"{line}\n" for line in lines).encode())


def summary(
    task: Task, ready: TrainingSetup, options: RunOptions, process: Process, resume: Checkpoint | None
) -> list[str]:
    """What is trained, on what, and where it is saved."""
    dataset, config, optim = ready.dataset, ready.info.config, ready.info.config.optim
    parts = parts_of(dataset)
    read = sum(len(part) * part.bytes_per_sample for part in parts) / len(dataset)
    steps, parameters = optim.num_steps(len(dataset)), count_parameters(task)
    batch = f"{optim.batch}" + (f" x {optim.accumulation} accumulated" if optim.accumulation > 1 else "")
    size = "x".join(map(str, config.network.image_size))
    lines = [
        f"{config.task}: {config.network.lifting} {config.network.backbone}, {parameters:,} parameters "
        f"({count_parameters(task.head):,} of them the head's), images {size}, grid {ready.info.grid}",
        f"{count(len(dataset), 'sample')} ({read / 1e6:.1f} MB each), {count(optim.epochs, 'epoch')}, {count(steps, 'step')} of {batch}; "
        f"{optim.optimizer} {optim.schedule} lr {optim.lr:g}, on {process.world} x {process.device.type}",
        f"checkpoints of {parameters * 12 / 1e6:.0f} MB in {options.out / 'checkpoints'}, the newest two are kept"
        + (f", and the best on {options.validate}" if ready.held_out is not None else ""),
    ]
    if len(parts) > 1:
        lines[1:1] = [
            f"mixed from {', '.join(f'{len(part)} of {part.reader.cache.path}' for part in parts)}, each once per epoch"
        ]
    if resume is not None:
        is_finished = resume.step >= steps
        lines.append(
            f"finished already, at step {steps}" if is_finished else f"continuing at step {resume.step} of {steps}"
        )
    return lines


def run_evaluation(
    path: Path,
    options: RunOptions,
    process: Process,
    *,
    batch: int,
    frame: str | None = None,
    allow_upsampling: bool = False,
) -> dict[str, Any]:
    """Evaluate a run's newest checkpoint on a whole split. Writes the results to options.out/SPLIT.json and returns them."""
    checkpoint, dataset, task = prepare_together(
        lambda: prepare_evaluation(path, options, frame, allow_upsampling=allow_upsampling)
    )
    info, reader, loop = checkpoint.info, dataset.reader, options.loop
    warnings = list(dict.fromkeys([*reader.cache.warnings, *info.warnings()]))
    process.print(*changes_of_meaning(dataset, checkpoint), *warnings, *notes_on_data(dataset))
    process.print(
        f"{checkpoint.path}: {info.config.task}, {checkpoint.describe_step()}, {count(len(dataset), 'sample')} of {reader.cache.path}, "
        f"reference frame {dataset.frames[0]}, on {process.device}",
        *note_on_precision(info.config.precision, process.device),
    )
    began = time.perf_counter()
    metric = evaluate(task, dataset, process, batch=batch, workers=loop.workers, progress=loop.progress)
    results = {
        "checkpoint": str(checkpoint.path), "task": info.config.task, "split": options.split,
        **measured(checkpoint, dataset), "skipped": len(reader) - int(reader.is_valid.sum()),
        "without_frame": dataset.num_without_frame, "without_targets": dataset.num_without_targets,
        "with_masked_cameras": int((~reader.camera_valid[dataset.keyframes]).any(axis=1).sum()), "simulated": warnings,
        "corruption": reader.cache.spec.to_dict()["corruption"],
        "origin": describe_origin(PACKAGES, gpu_names(process)), **metric.results(),
    }  # fmt: skip
    rate = len(dataset) / (time.perf_counter() - began)
    table = [f"{name:38} {text:>12}" for name, text in task.columns(results).items()]
    process.print(count(metric.num_samples, "sample"), *table, f"{rate:.3g} samples/s")
    if process.is_main:
        file = options.out / f"{options.split}.json"
        with saving(file):
            options.out.mkdir(parents=True, exist_ok=True)
            write_file(file, json.dumps(results, indent=1).encode())
        process.print(f"written to {file}")
    return results


def prepare_evaluation(
    path: Path, options: RunOptions, frame: str | None, *, allow_upsampling: bool = False
) -> tuple[Checkpoint, KeyframeDataset, Task]:
    """A run's newest checkpoint, the split in the run's frame or in `frame`, and the task. Raises ValueError.

    allow_upsampling: also if the run itself did not allow it.
    """
    checkpoint = find_checkpoint(path)
    info = checkpoint.info
    allowed = info.config.allow_upsampling or allow_upsampling
    config = replace(info.config, frame=frame or info.config.frame, allow_upsampling=allowed)
    dataset = KeyframeDataset(open_reader(options.cache, options.split), config, training=False)
    require_fit(dataset, info.grid, info.feature_dim, str(checkpoint.path))
    return checkpoint, dataset, restore(checkpoint, config)


def open_readers(config: Config, options: RunOptions) -> list[CacheReader]:
    """Of the caches that are trained on. Raises CacheError as `open_reader`, and ValueError if they cannot be mixed."""
    caches = [options.cache, *options.more_caches]
    if len(caches) > 1 and not config.is_pretext:
        raise ValueError(f"--cache is given {len(caches)} times: only a pretraining mixes caches, pass one to finetune")
    if len({cache.resolve() for cache in caches}) < len(caches):
        raise ValueError(f"--cache: {', '.join(map(str, caches))}: pass each cache once")
    return [open_reader(cache, options.split) for cache in caches]


def open_reader(cache: Path, split: str) -> CacheReader:
    """Raises CacheError if the cache is absent, unfinished or damaged."""
    return CacheReader(cache / f"{split}.zarr")

"""The runs whose features are drawn, and the keyframes on which: those shown, and those to which colours are fitted."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.common.suggest import did_you_mean
from occfeat_train.data.dataset import KeyframeDataset
from occfeat_train.report.correlation import Point
from occfeat_train.report.runs import evenly_spread
from occfeat_train.tasks.pretraining import Pretraining
from occfeat_train.training.checkpoint import Checkpoint, find_checkpoint
from occfeat_train.training.compatibility import require_fit
from occfeat_train.training.saving import CheckpointError

MAX_FITTED = 8  # keyframes to which the colours are fitted


@dataclass(frozen=True)
class FigureOptions:
    """What is drawn.

    split: of the keyframes. keyframes: their numbers; else `samples` of them, evenly spread over the split.
    fit_split, fit_on: split and scene to which the colours are fitted; by default `split`, and the scene of the first keyframe, or the first
    scene of another split.
    voxels, classes: points and classes for correlation maps; without any, the DEFAULT_CLASSES that the cache has.
    rerun: file of a recording for the viewer rerun; None for none.
    """

    split: str
    keyframes: Sequence[int] = ()
    samples: int = 2
    fit_split: str | None = None
    fit_on: str | None = None
    voxels: Sequence[Point] = ()
    classes: Sequence[str] = ()
    rerun: Path | None = None
    progress: bool = True


@dataclass(frozen=True)
class FeatureRun:
    """A run that can be drawn. dataset, fit_dataset: keyframes of the split, and of the split to which colours are fitted."""

    name: str
    checkpoint: Checkpoint
    dataset: KeyframeDataset
    fit_dataset: KeyframeDataset


def open_runs(
    paths: Sequence[Path], reader: CacheReader, fit_reader: CacheReader, print_line: Callable[[str], None]
) -> tuple[list[FeatureRun], list[str]]:
    """The runs that can be drawn, and a note for each that cannot. Raises ValueError if none can."""
    runs: list[FeatureRun] = []
    notes: list[str] = []
    for path in dict.fromkeys(paths):
        try:
            run = open_run(path, reader, fit_reader)
        except (ValueError, OSError) as err:
            notes.append(f"{path} is left out: {err}")
            continue
        taken = [other.name for other in runs]
        names = itertools.chain([run.name], (f"{run.name}-{number}" for number in itertools.count(2)))
        runs.append(replace(run, name=next(name for name in names if name not in taken)))
    if not runs:
        raise ValueError("; ".join(notes))
    for note in notes:
        print_line(note)
    return runs, notes


def open_run(path: Path, reader: CacheReader, fit_reader: CacheReader) -> FeatureRun:
    """Raises ValueError or OSError if the run cannot be drawn."""
    checkpoint = find_checkpoint(path)
    config = checkpoint.info.config
    if not (issubclass(config.task_class, Pretraining) and config.loss.feat):
        what = f"task {config.task}" if not issubclass(config.task_class, Pretraining) else "loss.feat=0"
        raise CheckpointError(
            f"it predicts no features ({what}): a run of 'occfeat-train pretrain' with the feature loss is expected"
        )
    dataset = KeyframeDataset(reader, config, training=False)
    fit_dataset = dataset if fit_reader is reader else KeyframeDataset(fit_reader, config, training=False)
    for each in dict.fromkeys((dataset, fit_dataset)):
        require_fit(each, checkpoint.info.grid, checkpoint.info.feature_dim, str(checkpoint.path))
    is_checkpoint = path.parent.name == "checkpoints"
    name = f"{path.parent.parent.name}-{path.name}" if is_checkpoint else path.name
    return FeatureRun(name, checkpoint, dataset, fit_dataset)


def choose_keyframes(dataset: KeyframeDataset, options: FigureOptions) -> list[int]:
    """Raises ValueError if a keyframe that was asked for cannot be used."""
    if not options.keyframes:
        return evenly_spread(dataset.keyframes, options.samples)
    usable, path = dataset.keyframes.tolist(), dataset.reader.cache.path
    for keyframe in options.keyframes:
        if not 0 <= keyframe < len(dataset.reader):
            raise ValueError(f"--keyframes {keyframe}: {path} has keyframes 0 to {len(dataset.reader) - 1}")
        if keyframe not in usable:
            raise ValueError(
                f"--keyframes {keyframe}: {path} has no grid for it in {' or '.join(dataset.frames)}, because it was skipped or that "
                "camera is masked: choose another"
            )
    return list(dict.fromkeys(options.keyframes))


def fit_keyframes(dataset: KeyframeDataset, options: FigureOptions, chosen: Sequence[int]) -> list[int]:
    """Up to MAX_FITTED usable keyframes of the scene to which colours are fitted. Raises ValueError if it has none."""
    scenes, cache = dataset.reader.cache.identity.scenes, dataset.reader.cache
    is_same = options.fit_split in (None, options.split)
    scene = options.fit_on or scenes[chosen[0] if is_same else int(dataset.keyframes[0])]
    keyframes = dataset.keyframes[[scenes[keyframe] == scene for keyframe in dataset.keyframes]]
    if not len(keyframes):
        names = list(dict.fromkeys(scenes[keyframe] for keyframe in dataset.keyframes))
        remedy = did_you_mean(scene, names) or f": it has {', '.join(names[:5])}{', ...' * (len(names) > 5)}"
        raise ValueError(f"--fit-on {scene}: {cache.path} has no usable keyframe of that scene{remedy}")
    return evenly_spread(keyframes, MAX_FITTED)

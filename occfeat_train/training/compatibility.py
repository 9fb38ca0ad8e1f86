"""Whether a data set fits a checkpoint, and what a user should know about it."""

from __future__ import annotations

from typing import Any

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.spec import BOXES_NOTE
from occfeat_targets.common.plural import count
from occfeat_train.cache_needs import wrong_teacher
from occfeat_train.config import FIXED, MEANING, Config
from occfeat_train.data.dataset import KeyframeDataset
from occfeat_train.data.frames import why_left_out
from occfeat_train.training.checkpoint import Checkpoint
from occfeat_train.training.saving import CheckpointError

# Fields of a cache that say which arrays it has, not what the others hold.
CONTENTS = {"format_version", "labels", "teacher", "max_points", "rays", "instances"}


def require_fit(dataset: KeyframeDataset, grid: VoxelGrid, feature_dim: int, of: str) -> None:
    """Raises CheckpointError unless the data set has the grid and, if it reads features, the number of channels of `of`."""
    cache = dataset.reader.cache
    if dataset.grid != grid:
        raise CheckpointError(
            f"{cache.path} has the grid {dataset.grid}, {of} has {grid}: build a cache with that grid, or use another run"
        )
    teacher = cache.spec.teacher
    if "features" in dataset.arrays and teacher is not None and teacher.dim != feature_dim:
        raise CheckpointError(
            f"{cache.path} has features of {teacher.dim} channels ({teacher.name}), {of} has {feature_dim}: build a "
            "cache with the same teacher, or use another run"
        )


def require_teacher(config: Config, dataset: KeyframeDataset) -> None:
    """Raises CheckpointError if features are read that are not those of the teacher that the config names."""
    cache = dataset.reader.cache
    teacher = cache.spec.teacher
    if "features" not in dataset.arrays or teacher is None:
        return
    if (reason := wrong_teacher(config.teacher, teacher)) is not None:
        raise CheckpointError(
            f"{cache.path}: {reason}: build a cache with --teacher {config.teacher}, or train on this one with --set teacher=any"
        )


def changes_of_meaning(dataset: KeyframeDataset, start: Checkpoint) -> list[str]:
    """A line for each field of MEANING that differs from the checkpoint's training, and for a different teacher.

    Raises CheckpointError if the weights do not fit the changed field.
    """
    here, there = dataset.config.flat(), start.info.config.flat()
    changed = [name for name in MEANING if here[name] != there[name]]
    for name in changed:
        if name in FIXED:
            raise CheckpointError(
                f"{name}={here[name]}: {start.path} holds a {there['network.lifting']} {there['network.backbone']} with "
                f"{there['network.channels']} channels (task {there['task']}), whose weights fit no other value than {there[name]}: leave "
                "that option or preset out, or train without --from"
            )
    lines = [
        f"{name}={here[name]} overrides {there[name]}, which the network of {start.path} was trained with"
        for name in changed
    ]
    ours, theirs = (t.get("teacher") or {} for t in (dataset.reader.cache.spec.to_dict(), start.info.targets))
    same = all(ours.get(name) == value for name, value in theirs.items() if name not in ("name", "dtype"))
    if "features" in dataset.arrays and not same:
        lines.append(f"another teacher: the cache's features are {ours}, the head of {start.path} predicts {theirs}")
    return lines + other_cache(dataset, start)


def other_cache(dataset: KeyframeDataset, start: Checkpoint) -> list[str]:
    """A line that says in what the cache differs from that of the checkpoint's training, if it is another one.

    A network may be pretrained on one cache and finetuned on another, for example with larger images. Which labels, returns and
    features there are is left out: `changes_of_meaning` compares the teachers where features are read.
    """
    cache, there = dataset.reader.cache, start.info.targets
    here = {"grid": cache.spec.grid.to_dict(), **cache.spec.to_dict()}
    changed = [
        f"{name}={here[name]} here, {there[name]} there"
        for name in here
        if name in there and name not in CONTENTS and here[name] != there[name]
    ]
    return (
        [f"{cache.path} differs from the cache that {start.path} was trained on: {'; '.join(changed)}"]
        if changed
        else []
    )


def left_out(dataset: KeyframeDataset) -> list[str]:
    """A line for each reason why keyframes of the cache are left out."""
    reader, lines = dataset.reader, []
    of = f"of {len(reader)} keyframes of {reader.cache.path.name}"
    skipped = len(reader) - int(reader.is_valid.sum())
    if skipped:
        lines.append(f"{skipped} {of} were skipped by its build and are left out")
    if dataset.num_without_frame:
        lines.append(f"{dataset.num_without_frame} {of} are left out: {why_left_out(dataset.frames)}")
    if dataset.num_without_targets:
        lines.append(f"{dataset.num_without_targets} {of} are left out: {dataset.config.task_class.without_targets}")
    return lines


def notes_on_data(dataset: KeyframeDataset) -> list[str]:
    """A line for each thing that a user should know of the cache's keyframes as they are used."""
    reader, lines = dataset.reader, left_out(dataset)
    masked = int((~reader.camera_valid[dataset.keyframes]).sum())
    if masked:
        lines.append(f"{count(masked, 'masked camera')} in the keyframes used: no feature is read from masked cameras")
    if (corruption := reader.cache.spec.corruption) is not None:
        lines.append(f"{reader.cache.path}: {corruption.describe()}")
    if reader.cache.spec.uses_boxes and "occupancy" in dataset.arrays:
        lines.append(f"{reader.cache.path.name}: {BOXES_NOTE}")
    if dataset.enlarges:
        size = "x".join(map(str, reader.cache.spec.image_size))
        largest = "x".join(map(str, dataset.largest_images))
        lines.append(f"the cache's images of {size} are enlarged to up to {largest} (--allow-upsampling)")
    return lines


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

"""Initial weights of a run, and the task of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from occfeat_train.config import Config
from occfeat_train.networks.encoder_weights import DEFAULT_WEIGHTS, load_backbone_weights
from occfeat_train.tasks.base import Task
from occfeat_train.tasks.build import build_task
from occfeat_train.training.checkpoint import Checkpoint, find_checkpoint, load_weights
from occfeat_train.training.saving import CheckpointError


def find_initial(path: Path, *, allow_unfinished: bool) -> Checkpoint:
    """The checkpoint that another run starts from: of a finished run, or the one whose directory is given, of any step.

    Raises CheckpointError on a run that has not finished, unless allow_unfinished is true.
    """
    start = find_checkpoint(path)
    if not (start.is_finished or allow_unfinished or start.path.samefile(path)):
        raise CheckpointError(
            f"{path} has not finished, it is at step {start.step} of {start.info.num_steps}: run its command again, or pass "
            "--allow-unfinished to start from these weights"
        )
    return start


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
    there = start.info.config
    same_head = (there.task, there.loss.heads) == (config.task, config.loss.heads)
    load_weights(task, start.weights(), start.path, only="" if same_head else "network.")
    return f"network{' and head' * same_head} from {start.path} ({start.info.config.task}, {start.describe_step()})"


def restore(checkpoint: Checkpoint, config: Config | None = None) -> Task:
    """The task of a checkpoint with its weights."""
    info = checkpoint.info
    task = build_task(config or info.config, info.grid, info.feature_dim)
    load_weights(task, checkpoint.weights(), checkpoint.path)
    return task

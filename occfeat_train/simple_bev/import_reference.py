"""Convert a checkpoint of the reference repository (aharley/simple_bev) to a run, to evaluate or to finetune from."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.common.pickled import UnsafePickle
from occfeat_targets.common.state_dict import NoStateDict, load_state_dict
from occfeat_train.config import REFERENCE_LIFTINGS, Config
from occfeat_train.distributed import Process
from occfeat_train.simple_bev.weights import convert
from occfeat_train.tasks.build import build_task
from occfeat_train.training.checkpoint import RunInfo, load_weights, save_checkpoint
from occfeat_train.training.run_directory import begin_run
from occfeat_train.training.run_lock import locked_run
from occfeat_train.training.saving import CheckpointError

# Tensors that only one of the reference's networks has.
_MARKS = {"bev_compressor.0.weight": "simplebev", "bev_queries": "bevformer"}


def import_reference(file: Path, config: Config, grid: VoxelGrid, out: Path) -> Path:
    """Convert a checkpoint, check that all its tensors fit `config`'s network, and write it as a run. Returns its path.

    config: a vehicle segmentation, with compat="simple-bev" to compute the same function as the reference. With
    loss.heads="simple-bev" the centre and offset heads and the learned weights of the losses are imported, too.
    Raises CheckpointError or ValueError on a file that is no checkpoint, is of another network, or does not fit the grid.
    """
    state = read_state_dict(file)
    found = next((lifting for name, lifting in _MARKS.items() if name in state), "lss")
    if found != config.network.lifting:
        raise CheckpointError(f"{file} is of a {found}, not of a {config.network.lifting}: pass --network {found}")
    try:
        weights = convert(state, grid, heads=config.loss.heads == "simple-bev")
    except ValueError as err:
        raise CheckpointError(f"{file} can't be imported: {err}") from err
    config = replace(config, frame="cameras")  # the only one in the reference
    task = build_task(config, grid, 0)
    load_weights(task, weights, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    info = RunInfo(
        config, grid, feature_dim=0, cache="", num_samples=0, initial=f"imported from {file.name} ({digest})"
    )
    with locked_run(out, Process(0, 1, torch.device("cpu"))):
        begin_run(out, info)
        return save_checkpoint(out, 0, info, task.state_dict(), {})


def read_state_dict(file: Path) -> Mapping[str, Any]:
    """The file's state_dict, alone or in a checkpoint, without the prefixes of DataParallel and torch.compile.

    Code in it is never executed. Raises CheckpointError.
    """
    try:
        tensors = load_state_dict(file).tensors
    except IsADirectoryError as err:
        raise CheckpointError(f"{file} is a directory: pass the model-*.pth file in it") from err
    except UnsafePickle as err:
        raise CheckpointError(
            f"{file} is refused, because {err}. If you trust the file, save its state_dict alone and import that: "
            "torch.save(torch.load(FILE, weights_only=False)['model_state_dict'], 'weights.pth')"
        ) from err
    except NoStateDict as err:
        raise CheckpointError(
            f"{file} can't be imported: {err}; one of {', '.join(REFERENCE_LIFTINGS)} is expected"
        ) from err
    except ValueError as err:
        raise CheckpointError(f"{file} can't be read, because {err}: download it again") from err
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", name): value for name, value in tensors.items()}

"""The Python API refuses arguments of a wrong type or shape by name, with what it expects."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import occfeat_train
from occfeat_train.training.saving import CheckpointError


def voxel_arguments() -> dict[str, Any]:
    """Valid arguments of `voxel_features`: 2 cameras, 7 points."""
    transforms = torch.eye(4).repeat(2, 1, 1)
    return {
        "features": torch.rand(2, 4, 5, 6), "centers": torch.rand(7, 3), "intrinsics": transforms[:, :3, :3],
        "cam_from_ego": transforms, "grid_from_ego": torch.eye(4), "image_size": (32, 48),
        "image_area": torch.tensor([[0, 0, 32, 48]] * 2), "cell_size": (1.25, 0.5, 0.5),
    }  # fmt: skip


@pytest.mark.parametrize("name", [name for name in voxel_arguments() if name not in ("image_size", "cell_size")])
def test_voxel_features_ask_for_tensors_instead_of_arrays(name):
    arguments = voxel_arguments()
    occfeat_train.voxel_features(**arguments)
    arguments[name] = arguments[name].numpy()
    with pytest.raises(
        ValueError, match=f"{name} is of type ndarray: expected a torch.Tensor; torch.as_tensor converts"
    ):
        occfeat_train.voxel_features(**arguments)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "features",
            lambda x: (100 * x).to(torch.int8),
            "features are torch.int8: expected float, int8 ones multiplied",
        ),
        ("features", lambda x: x[None], r"features of shape \(1, 2, 4, 5, 6\): expected \(V, h, w, C\)"),
        ("cam_from_ego", lambda x: x[:1], r"cam_from_ego of shape \(1, 4, 4\) beside .* expected \(2, 4, 4\)"),
        ("grid_from_ego", lambda x: x.repeat(2, 1, 1), r"grid_from_ego of shape \(2, 4, 4\): expected \(4, 4\)"),
        ("grid_from_ego", lambda x: 0 * x, "all zeros as in the frame of a masked camera, .*: leave the sample out"),
        ("grid_from_ego", lambda x: x / 0, "grid_from_ego is not finite"),
        ("image_size", lambda x: (3, *x), r"image_size=\(3, 32, 48\): expected \(height, width\)"),
        ("image_size", lambda x: x[0], r"image_size=32: expected \(height, width\)"),
        ("cell_size", lambda x: x[0], r"cell_size=1.25: expected the grid's \(up, forward, right\)"),
        ("cell_size", lambda x: (0.0, *x[1:]), r"cell_size=\(0.0, 0.5, 0.5\): expected the grid's"),
    ],
)
def test_voxel_features_refuse_other_shapes_and_values(unchecked, name, change: Callable[[Any], Any], message):
    arguments = voxel_arguments()
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=message):
        occfeat_train.voxel_features(**arguments)


def test_features_ask_for_tensors_instead_of_arrays(pretrained):
    network = occfeat_train.load(pretrained)
    images, transforms = torch.rand(1, 2, 3, 32, 48), torch.eye(4).repeat(1, 2, 1, 1)
    given = {
        "images": images,
        "intrinsics": transforms[..., :3, :3],
        "cam_from_ego": transforms,
        "grid_from_ego": transforms[:, 0],
    }
    given["image_area"] = torch.tensor([[[0, 0, 32, 48]] * 2])
    for name in given:
        with pytest.raises(ValueError, match=f"{name} is of type ndarray: expected a torch.Tensor"):
            network.features(**{**given, name: given[name].numpy()})


def test_load_and_open_cache_refuse_several_paths(tmp_path):
    for path in ([tmp_path], None, {}):
        with pytest.raises(ValueError, match=f"path is of type {type(path).__name__}: expected the directory of a run"):
            occfeat_train.load(path)
        with pytest.raises(
            ValueError, match=f"path is of type {type(path).__name__}: expected the directory of a cache"
        ):
            occfeat_train.open_cache(path)
    with pytest.raises(ValueError, match="keys=3: expected a list of names"):
        occfeat_train.open_cache(tmp_path, keys=3)


def test_load_takes_a_string_or_a_path(pretrained, tmp_path):
    assert occfeat_train.load(str(pretrained)).channels == occfeat_train.load(Path(pretrained)).channels
    with pytest.raises(CheckpointError):
        occfeat_train.load(str(tmp_path))

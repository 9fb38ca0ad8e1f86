"""The Python API of occfeat_targets gives the results and defaults of the command line."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch

import occfeat_targets
from occfeat_targets.build.options import BuildOptions
from occfeat_targets.build_command import build as command
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.cache.spec import CAMERAS, EGO_BOX
from occfeat_targets.sources.nuscenes import read_split
from occfeat_targets.sources.source import SOURCES
from occfeat_targets.sources.sweeps import read_sweep
from tests.conftest import readme_code
from tests.targets.command_line import assert_same_bytes, run

# Every option with a value other than its default, as command line and as keywords.
COMMAND_LINE = [
    *("--source", "other"), *("--version", "v1.0-mini"), *("--scenes", "a,b"), *("--grid", "4x20x12"), *("--range", "-2", "2", "-10", "10", "-6", "6"),
    *("--frames", "both"), *("--sweeps", "3"), *("--dynamic", "smear"), *("--image-size", "96x160"), *("--teacher", "none"),
    *("--teacher-layer", "pre-norm"), *("--teacher-dtype", "float32"), *("--teacher-batch", "2"),
    *("--feature-size", "56x98"), *("--feature-dtype", "int8"), *("--label-kinds", "map"), *("--dividers", "road+lane"),
    *("--compat", "simple-bev"), "--instances", "--points", "--rays", *("--shard", "1/3"), *("--shard-size", "2"), *("--on-error", "skip"),
    "--retry-skipped", *("--device", "cpu"),
]  # fmt: skip
KEYWORDS = {
    "source": "other", "version": "v1.0-mini", "scenes": ["a", "b"], "grid": VoxelGrid((4, 20, 12), (-2, -10, -6), (2, 10, 6)),
    "frames": "both", "sweeps": 3, "dynamic": "smear", "image_size": (96, 160), "teacher": None, "teacher_layer": "pre-norm",
    "teacher_dtype": "float32", "teacher_batch": 2, "feature_size": (56, 98), "feature_dtype": "int8", "label_kinds": ["map"],
    "dividers": "road+lane", "compat": "simple-bev", "instances": True, "points": True, "rays": True, "shard": (1, 3), "shard_size": 2, "on_error": "skip",
    "retry_skipped": True, "device": "cpu",
}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "keywords"), [([], {}), (COMMAND_LINE, KEYWORDS), (["--plan-only"], {"plan_only": True})]
)
def test_build_cache_makes_the_plan_of_the_command(tmp_path, monkeypatch, arguments, keywords):
    planned = []

    def make_plan(options: BuildOptions, **_: object) -> None:
        planned.append(options)
        raise ValueError("planned")

    monkeypatch.setattr("occfeat_targets.build.plan.make_plan", make_plan)
    monkeypatch.setitem(SOURCES, "other", "a_module_that_is_never_imported:Source")
    run("build", "--dataroot", tmp_path, "--cache", tmp_path, "--split", "train", *arguments, check=False)
    with pytest.raises(ValueError, match="planned"):
        occfeat_targets.build_cache(tmp_path, tmp_path, "train", **keywords)
    assert planned[0] == planned[1]


def test_build_cache_has_every_option_of_the_command_but_those_of_corrupted_caches():
    theirs = {parameter.name for parameter in command.params} - {"grid_shape", "grid_range", "no_labels"}
    theirs -= {"corruption", "severity", "corruption_seed", "corrupt_at", "nuscenes_c", "mask_lost"}
    assert set(inspect.signature(occfeat_targets.build_cache).parameters) == theirs | {"grid", "log", "progress"}
    used = {
        "dataroot",
        "cache",
        "split",
        "workers",
        "scheduler",
        "scheduler_file",
        "plan_only",
        "overwrite",
    }  # not part of the plan: they choose where it runs, and what becomes of an older cache
    assert set(KEYWORDS) == (theirs | {"grid"}) - used


def test_build_cache_writes_the_bytes_of_the_command(city, tiny_teacher, tmp_path, expected):
    lines: list[str] = []
    path = occfeat_targets.build_cache(
        city, tmp_path, "mini_train", teacher=tiny_teacher, frames="both", image_size=(96, 160), feature_size=(56, 98),
        grid=VoxelGrid((8, 100, 100), (-5, -25, -25), (5, 25, 25)),
        teacher_dtype="float32", shard_size=2, workers=0, log=lines.append, progress=False,
    )  # fmt: skip
    assert path == tmp_path / "mini_train.zarr"
    assert_same_bytes(tmp_path, expected)
    assert "SIMULATED: the data set is a synthetic city" in lines


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": "car"}, "frames='car': one of ego, cameras, both expected"),
        ({"on_error": "ignore"}, "on_error='ignore': one of fail, skip, mask-camera expected"),
        ({"teacher_dtype": "float16"}, "teacher_dtype='float16': one of auto, float32, bfloat16 expected"),
        ({"label_kinds": ["cars"]}, "label_kinds=.'cars'.: a list of some of vehicles, map expected"),
        ({"label_kinds": "map"}, "label_kinds='map': a list of some of vehicles, map expected"),
        ({"scenes": "scene-0061"}, "scenes='scene-0061': a list of names expected"),
        ({"scenes": ["scene-0061", 61]}, r"scenes=\['scene-0061', 61\]: a list of names expected"),
        ({"label_kinds": [["map"]]}, r"label_kinds=\[\['map'\]\]: a list of some of vehicles, map expected"),
        ({"grid": (8, 200, 200)}, r"grid=\(8, 200, 200\): an occfeat_targets.VoxelGrid expected"),
        ({"image_size": "270x480"}, r"image_size='270x480': \(height, width\) \[px\] expected"),
        ({"feature_size": 224}, r"feature_size=224: \(height, width\) \[px\] expected"),
        ({"sweeps": "3"}, "sweeps='3': a whole number expected"),
        ({"shard": "0/3"}, "shard='0/3': .k, n. with 0 <= k < n expected"),
        ({"workers": -1}, "workers=-1: at least 0 expected"),
        ({"teacher_batch": 0}, "teacher_batch=0: at least 1 expected"),
        ({"shard": (3, 3)}, "shard=.3, 3.: .k, n. with 0 <= k < n expected"),
        ({"shard": (0, 2), "workers": 0}, "ways to run a build: choose one"),
    ],
)
def test_build_cache_refuses_before_it_writes(city, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        occfeat_targets.build_cache(city, tmp_path / "cache", "mini_train", teacher=None, log=None, **options)
    assert not (tmp_path / "cache").exists()


def test_build_cache_refuses_several_paths_and_a_split_that_is_no_name(tmp_path):
    with pytest.raises(ValueError, match=r"dataroot=\['a', 'b'\]: one string or Path expected"):
        occfeat_targets.build_cache(["a", "b"], tmp_path, "train")
    with pytest.raises(ValueError, match="split=None: its name expected"):
        occfeat_targets.build_cache("a", tmp_path, None)


def test_build_cache_raises_when_a_shard_fails(broken_city, tmp_path):
    for sweep in (broken_city / "samples" / "LIDAR_TOP").iterdir():
        sweep.write_bytes(sweep.read_bytes()[:1001])
    with pytest.raises(ValueError, match="1 shard of .* failed .shard 0: sample .*past a whole return"):
        occfeat_targets.build_cache(
            broken_city, tmp_path, "mini_train", teacher=None, image_size=(96, 160), workers=0, log=None, progress=False
        )


def test_a_point_fills_its_voxel_and_no_other():
    grid = occfeat_targets.VoxelGrid((4, 10, 6), (-2, -10, -6), (2, 10, 6))
    right_forward_up = np.array([[1.5, -3.0, 0.5, 9, 9]], np.float32)
    volume = occfeat_targets.voxelize(right_forward_up, grid)
    assert volume.dtype == np.bool_ and volume.shape == (4, 10, 6)
    assert np.argwhere(volume).tolist() == [[2, 3, 3]]
    ego = np.array([[-3.0, -1.5, 1.0]], np.float32)  # forward, left, up
    moved = occfeat_targets.voxelize(ego, grid, grid_from_points=occfeat_targets.GRID_FROM_EGO_AXES)
    assert np.array_equal(moved, volume)
    assert not occfeat_targets.voxelize(right_forward_up, grid, ego_box=3.1).any()


def test_voxelize_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"grid_from_points of shape \(2, 4, 4\): expected \(4, 4\)"):
        occfeat_targets.voxelize(np.zeros((1, 3), np.float32), grid_from_points=np.zeros((2, 4, 4)))
    with pytest.raises(ValueError, match=r"points of shape \(3,\)"):
        occfeat_targets.voxelize(np.zeros(3, np.float32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"points": "sweep.bin"}, "points of type str cannot be read as an array of numbers .*; read a file into one"),
        ({"points": [Path("a.bin"), Path("b.bin")]}, "points of type list cannot be read as an array of numbers"),
        (
            {"points": torch.zeros(1, 3, requires_grad=True)},
            r"points of type Tensor .* as tensor.detach\(\).cpu\(\).numpy\(\)",
        ),
        ({"grid_from_points": "ego"}, "grid_from_points of type str cannot be read"),
        ({"grid": (8, 200, 200)}, r"grid=\(8, 200, 200\): an occfeat_targets.VoxelGrid expected"),
    ],
)
def test_voxelize_refuses_other_types(arguments, message):
    with pytest.raises(ValueError, match=message):
        occfeat_targets.voxelize(**{"points": np.zeros((1, 3), np.float32), **arguments})


def test_voxelize_takes_a_tensor_on_the_cpu():
    points = torch.tensor([[1.0, 2.0, 0.5]])
    assert np.array_equal(occfeat_targets.voxelize(points), occfeat_targets.voxelize(points.numpy()))


def test_voxelize_equals_a_caches_occupancy(city, serial):
    reader = CacheReader(serial / "mini_train.zarr")
    keyframe = read_split(city, "mini_train", version=None, cameras=CAMERAS, num_sweeps=1, with_boxes=False).keyframes[
        3
    ]
    sweep, grid = keyframe.sweeps[0], reader.cache.spec.grid
    transform = occfeat_targets.GRID_FROM_EGO_AXES @ sweep.ego_from_sensor
    volume = occfeat_targets.voxelize(read_sweep(sweep.path), grid, grid_from_points=transform, ego_box=EGO_BOX)
    assert np.array_equal(volume, grid.unpack_volume(reader.read("occupancy", 3))[0])


def test_the_readmes_example_of_targets_runs(city, tiny_teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "nuscenes").symlink_to(city)
    (tmp_path / "dinov2-small").symlink_to(tiny_teacher)
    names: dict[str, object] = {}
    exec(readme_code("From Python")[0], names)
    assert len(CacheReader(names["path"])) == 5
    assert np.argwhere(names["occupied"]).tolist() == [[4, 124, 102]]

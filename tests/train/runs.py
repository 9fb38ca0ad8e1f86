"""Complete training runs of a second or two: tiny caches with random contents, and the occfeat-train command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from occfeat_targets.cache.corruption import CorruptionSpec
from occfeat_targets.cache.create import create_cache
from occfeat_targets.cache.geometry import GRID_FROM_CAMERA_AXES, inverse_rigid, rigid
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.labels import LABEL_KINDS
from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.cache.records import digest, read_record, write_record
from occfeat_targets.cache.spec import CAMERAS, EGO_FRAME, TargetSpec, TeacherSpec
from occfeat_targets.cache.store import Cache, Identity
from occfeat_train.cli import main
from occfeat_train.training.checkpoint import find_checkpoint
from occfeat_train.training.log import RunLog, read_log

KILLS = int(os.environ.get("OCCFEAT_KILLS", "3"))
COMMAND = [sys.executable, "-m", "occfeat_train"]
GRID = VoxelGrid((4, 12, 12), (-2, -6, -6), (2, 6, 6))
FRAMES = (EGO_FRAME, "CAM_FRONT", "CAM_BACK")
TRAIN_SCENES, VAL_SCENES = tuple("aaabbcc"), tuple("ddeee")  # 7 and 5 keyframes: not divisible by a batch or world size
# Two of the six cameras suffice here and take a third of the time.
TINY = [
    "--backbone-weights", "none", "--set", "network.channels=8", "--set", "network.image_size=32x48",
    "--set", "augment.num_cameras=2", "--set", "optim.lr=1e-4",
]  # fmt: skip
QUIET = ["--no-progress", "--device", "cpu"]
# Of DataLoaders, on machines with a single core, and about forking a process with threads.
WORKERS = pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:This process .* is multi-threaded")
TIMES = ("samples_per_s", "data_wait", "time")  # fields of a record that differ between runs


def random_keyframes(spec: TargetSpec, keyframes: Iterable[int], seed: int) -> dict[str, np.ndarray]:
    """Random arrays of keyframes with a rig of level cameras. They depend on the keyframe and the seed, not on the shard."""
    keyframes = list(keyframes)
    out = {a.name: np.zeros((len(keyframes), *a.shape), a.dtype) for a in spec.arrays()}
    for row, keyframe in enumerate(keyframes):
        rng = np.random.default_rng((seed, keyframe))
        for name, array in out.items():
            if array.dtype == np.float16:
                array[row] = rng.standard_normal(array.shape[1:])
            elif array.dtype == np.uint8 and name == "images":
                array[row] = rng.integers(0, 256, array.shape[1:])
            elif array.dtype == np.int16:
                array[row] = rng.integers(-9, 10, array.shape[1:])
            elif array.dtype == np.uint8:  # packed bits, or distances
                share = 0.9 if name == "labels/vehicles_valid" else 0.2
                array[row] = np.packbits(rng.random((*array.shape[1:], 8)) < share, axis=-1)[..., 0]
        for camera in range(len(spec.cameras)):
            half = (2 * np.pi * camera / len(spec.cameras) + rng.uniform(-0.1, 0.1)) / 2
            turned = rigid((np.cos(half), 0, np.sin(half), 0), (0, 0, 0))
            out["cam_from_ego"][row, camera] = turned @ inverse_rigid(GRID_FROM_CAMERA_AXES)
        height, width = spec.image_size
        out["intrinsics"][row] = [[0.5 * width, 0, width / 2], [0, 0.5 * width, height / 2], [0, 0, 1]]
        for frame in range(len(spec.frames)):  # the grid, rotated about the vertical axis
            out["grid_from_ego"][row, frame] = rigid(
                (np.cos(0.4 * frame), 0, 0, np.sin(0.4 * frame)), (0.2 * frame, 0, 0)
            )
        if spec.max_points:
            out["points"][row] = rng.uniform((-6, -6, -1, 0), (6, 6, 2, 255), (spec.max_points, 4))
            out["num_points"][row], out["sweep_origins"][row] = spec.max_points, (1, 0, 1.8)
    out["is_valid"][:] = True
    out["camera_valid"][:] = True
    out["image_area"][:] = (0, 0, *spec.image_size)
    return out


def write_cache(
    folder: Path, split: str = "train", *, scenes: tuple[str, ...] = TRAIN_SCENES, grid: VoxelGrid = GRID, dim: int = 6,
    labels: tuple[str, ...] = tuple(LABEL_KINDS), frames: tuple[str, ...] = FRAMES, image_size: tuple[int, int] = (40, 60), teacher: str = "made up", seed: int = 0, first: int = 0, rays: bool = False, points: int = 0, compat: str | None = None, instances: bool = False, corruption: CorruptionSpec | None = None, shards: int | None = None, provenance: Mapping[str, Any] | None = None, change: Callable[[dict[str, np.ndarray]], None] | None = None,
) -> Cache:  # fmt: skip
    """A cache of a few keyframes in shards of 2; the first token is token`first`.

    points: LiDAR returns of each keyframe. dim: N_y; 0: no features. image_size: 32x48 resized by up to 1.2 fits. shards: number of shards to write (None: all).
    provenance: what the cache says of its origin, besides that it is made up.
    change: modifies the arrays {name: (N, ...)} of all keyframes before they are written.
    """
    features = TeacherSpec(teacher, f"digest of {Path(teacher).name}", (28, 42), 14, dim) if dim else None
    spec = TargetSpec(
        grid=grid,
        frames=frames,
        image_size=image_size,
        teacher=features,
        labels=labels,
        rays=rays,
        max_points=points,
        compat=compat,
        instances=instances,
        corruption=corruption,
    )
    n = len(scenes)
    identity = Identity(tuple(f"{split}-token{first + i}" for i in range(n)), scenes, tuple(range(n)))
    cache = create_cache(
        folder / f"{split}.zarr",
        spec,
        identity,
        keyframes_per_shard=2,
        provenance={"simulated": ["all of it"], **(provenance or {})},
    )
    arrays = random_keyframes(spec, range(n), seed)
    if change is not None:
        change(arrays)
    for shard in range(cache.num_shards if shards is None else shards):
        rows = cache.shard_range(shard)
        cache.write_shard(shard, {name: a[rows.start : rows.stop] for name, a in arrays.items()}, {"skipped": {}})
    return cache


def write_caches(folder: Path, **options: Any) -> Path:
    """A training split and a validation split."""
    write_cache(folder, "train", **options)
    write_cache(folder, "val", scenes=VAL_SCENES, **{"seed": 1, **options})
    return folder


def mask_camera(
    arrays: dict[str, np.ndarray], keyframes: list[int], camera: str, frames: tuple[str, ...] = FRAMES
) -> None:
    """Mask a camera of some keyframes, as a build does, and thereby the grid in its frame."""
    for name in ("camera_valid", "images", "features", "intrinsics", "cam_from_ego", "image_area"):
        if name in arrays:
            arrays[name][keyframes, CAMERAS.index(camera)] = 0
    for name in ("grid_from_ego", "occupancy", *(name for name in arrays if name.startswith("labels/"))):
        arrays[name][keyframes, frames.index(camera)] = 0


def invoke(*arguments: object) -> Result:
    """Run occfeat-train in this process, so that a test need not import everything again."""
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def succeed(*arguments: object) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def stop_early(*arguments: object) -> str:
    """Output of a training that a signal stopped, which has an exit code of its own."""
    result = invoke(*arguments)
    assert result.exit_code == 3, result.output
    return result.output


def refuse(*arguments: object, out: Path | None = None) -> str:
    """Output of a command that must fail without a traceback and before a step was trained at `out`."""
    result = invoke(*arguments)
    assert result.exit_code in (1, 2), result.output
    assert "Traceback" not in result.output
    assert out is None or not (out / "log.jsonl").exists()
    return result.output


def pretrain(cache: Path, out: Path, *more: object) -> list[str]:
    """Arguments of a tiny pretraining: 7 samples, 2 per step."""
    start = ["pretrain", "--cache", cache, "--out", out, *TINY, "--batch", "2", "--no-tensorboard", *QUIET]
    return [str(a) for a in (*start, *more)]


def finetune(cache: Path, out: Path, *more: object) -> list[str]:
    """Arguments of a tiny finetuning: 2 samples per step instead of the recipe's batch."""
    small = [*TINY, "--batch", "2", "--set", "optim.accumulation=1"]
    start = ["finetune", "--cache", cache, "--out", out, *small, "--no-tensorboard", *QUIET]
    return [str(a) for a in (*start, *more)]


def evaluate(run: Path, cache: Path, *more: object) -> list[str]:
    return [str(a) for a in ("evaluate", run, "--cache", cache, *QUIET, *more)]


def steps(number: int, *, batch: int = 2, samples: int = len(TRAIN_SCENES)) -> list[str]:
    """Options for a run of `number` steps."""
    return ["--epochs", repr((number * batch + 0.5) / samples)]


def start_process(arguments: list[str], *, processes: int = 1, **options: Any) -> subprocess.Popen[str]:
    """Start occfeat-train in a separate process, or in several under torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = COMMAND if processes == 1 else [*torchrun, *COMMAND[1:]]
    return subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal when step `step` is logged. Training then stops after the next step."""
    log = RunLog.step

    def logged(self: RunLog, record: dict[str, Any]) -> None:
        log(self, record)
        if record["step"] == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(RunLog, "step", logged)


def records(run: Path) -> list[dict[str, Any]]:
    """A run's training records without the fields that depend on time."""
    kept = [record for record in read_log(run) if "validation" not in record]
    return [{name: value for name, value in record.items() if name not in TIMES} for record in kept]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(find_checkpoint(run).path / "model.safetensors")


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Assert equality bit for bit, recursively in dictionaries and lists."""
    assert type(found) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and found.shape == expected.shape, where
        assert found.numpy().tobytes() == expected.numpy().tobytes(), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name, value in expected.items():
            assert_same(found[name], value, f"{where}/{name}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for index, value in enumerate(expected):
            assert_same(found[index], value, f"{where}/{index}")
    else:
        assert found == expected, where


def assert_same_run(found: Path, expected: Path) -> None:
    """Assert that weights, optimiser and schedule state, and all logged numbers are equal bit for bit."""
    ours, theirs = find_checkpoint(found), find_checkpoint(expected)
    assert ours.step == theirs.step
    assert_same(ours.weights(), theirs.weights(), "weights")
    assert_same(ours.trainer_state(), theirs.trainer_state(), "trainer")
    assert records(found) == records(expected)


def update_digests(folder: Path) -> None:
    """Write the current digests of a checkpoint's files to its record."""
    record = read_record(folder / "checkpoint.json")
    write_record(
        folder / "checkpoint.json", {**record, "files": {name: digest(folder / name) for name in record["files"]}}
    )


def config_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "config.json").read_text())["config"]


def copy_of(cache: Path, to: Path) -> Path:
    return Path(shutil.copytree(cache, to))


def reader(cache: Path, split: str = "train") -> CacheReader:
    return CacheReader(cache / f"{split}.zarr")


assert set(FRAMES[1:]) <= set(CAMERAS)

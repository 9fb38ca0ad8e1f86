"""A minimal source with three cameras of different sizes, computed points and no maps.

Also functions that run the command lines on it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image

from occfeat_targets.cache.geometry import Matrix, inverse_rigid, rigid
from occfeat_targets.sources.keyframe import CameraView, DatasetError, Keyframe, Split, Sweep
from occfeat_targets.sources.map_geometry import MapGeometry
from occfeat_train.cli import main as train
from tests.targets.command_line import Result, run

WHERE = ("--split", "all", "--cache")
SIZES = {"front": (96, 160), "tall": (160, 90), "wide": (60, 240)}  # (height, width)
SECONDS = (0.0, -0.05)  # of the sweeps


def ego_from_lidar(number: int) -> Matrix:
    """Pose (4, 4) of the sensor in sweep `number`. The ego moves forward by 0.4 m per sweep."""
    return rigid((np.cos(0.2), 0, 0, np.sin(0.2)), (0.5 - 0.4 * number, 0.1, 1.7))


def returns() -> NDArray[np.float32]:
    """(n, 4) returns in the sensor's frame: a ring of poles at 6 m, and three returns from the ego vehicle."""
    angle, up = (a.ravel() for a in np.meshgrid(np.arange(0, 2 * np.pi, 0.05), np.arange(-1.6, 0.3, 0.3)))
    points = np.stack([6.03 * np.cos(angle), 6.03 * np.sin(angle), up, angle], 1)
    return np.concatenate([points, [[0.5, 0.5, -1, 9], [-2.1, 2.1, -1, 9], [0, 0, 0, 9]]]).astype(np.float32)


def ego_from_camera(yaw: float) -> Matrix:
    """A level camera 1.5 m above the ego's origin that looks along `yaw` [rad]."""
    matrix = np.eye(4)
    matrix[:3, :3] = np.array([(np.sin(yaw), -np.cos(yaw), 0), (0, 0, -1), (np.cos(yaw), np.sin(yaw), 0)]).T
    matrix[2, 3] = 1.5
    return matrix


def write_toy(root: Path) -> Path:
    """Write images with smooth colours, each different."""
    for name, (height, width) in SIZES.items():
        for number in range(4):
            y, x = np.mgrid[:height, :width] / 30
            image = 128 + 100 * np.sin(np.stack([x + number, y + width, x + y], -1))
            (root / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.astype(np.uint8)).save(root / name / f"{number}.jpg", quality=95)
    return root


class ToySource:
    cameras = tuple(SIZES)
    slow_reader = None
    max_returns = 1000
    ego_box = 2.15

    def read_split(self, root: Path, split: str, *, version: str | None, num_sweeps: int, with_boxes: bool) -> Split:
        if split != "all":
            raise DatasetError(f"no split {split!r}: there is only 'all'")
        keyframes = []
        for number in range(4):
            views = []
            for i, (name, size) in enumerate(SIZES.items()):
                intrinsics = np.array([[80.0, 0, size[1] / 2], [0, 80, size[0] / 2], [0, 0, 1]])
                ego_from_cam = ego_from_camera(2.1 * i)
                views.append(
                    CameraView(
                        root / name / f"{number}.jpg", size, intrinsics, ego_from_cam, inverse_rigid(ego_from_cam)
                    )
                )
            path = root / "front" / f"{number}.jpg"
            sweeps = [Sweep(path, ego_from_lidar(i), seconds) for i, seconds in enumerate(SECONDS[:num_sweeps])]
            keyframes.append(
                Keyframe(
                    f"toy{number}", f"scene{number // 2}", number, "nowhere", cameras=tuple(views), sweeps=tuple(sweeps)
                )
            )
        return Split(split, "1", root, tuple(keyframes), (), ("nowhere",), has_annotations=False, is_synthetic=True)

    def read_sweep(self, path: Path) -> NDArray[np.float32]:
        return returns()

    def why_no_maps(self, split: Split) -> str:
        return "the toy has no maps"

    def map_file(self, split: Split, location: str) -> Path:
        raise NotImplementedError

    def read_map(self, split: Split, location: str, dividers: str) -> MapGeometry:
        raise NotImplementedError


def build(toy: Path, cache: Path, teacher: str, *more: str, check: bool = True) -> Result:
    return run(
        "build", "--source", "toy", "--dataroot", toy, *WHERE, cache, "--teacher", teacher, "--frames", "both",
        "--grid", "4x16x16", "--range", "-1", "3", "-8", "8", "-8", "8", "--image-size", "48x80", "--feature-size", "56x98",
        "--shard-size", "2", "--teacher-dtype", "float32", "--workers", "0", *more, check=check,
    )  # fmt: skip


def pretrain(cache: Path, run: Path, *more: str) -> str:
    tiny = ["network.channels=8", "network.image_size=32x48", "optim.lr=1e-4"]
    arguments = ["pretrain", *WHERE, cache, "--out", run, "--backbone-weights", "none", "--batch", "2", *more]
    arguments += [part for change in tiny for part in ("--set", change)]
    return invoke(train, *arguments, "--epochs", "1", "--device", "cpu", "--no-tensorboard", "--no-progress")


def invoke(command, *arguments: object) -> str:
    result = CliRunner().invoke(command, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.output

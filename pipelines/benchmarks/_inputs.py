"""Input of the kernel benchmarks: a real nuScenes keyframe if one is found, else synthetic data.

The dataroot is --dataroot, else OCCFEAT_REAL_SAMPLE, else ../shared/nuscenes-real-sample.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

REPOSITORY = Path(__file__).parents[2]


def find_dataroot(option: Path | None) -> Path | None:
    """The dataroot, or None. Raises ValueError if --dataroot is given and contains no samples."""
    if option is not None:
        if not (option / "samples").is_dir():
            raise ValueError(f"--dataroot {option} has no samples/: pass a nuScenes dataroot")
        return option
    default = REPOSITORY.parent / "shared" / "nuscenes-real-sample"
    root = Path(os.environ.get("OCCFEAT_REAL_SAMPLE", default))
    return root if (root / "samples").is_dir() else None


def find_sweep(option: Path | None, dataroot: Path | None) -> tuple[Path, str]:
    """(path of a .pcd.bin, description)."""
    found = option
    if found is None and dataroot is not None:
        found = next(iter(sorted((dataroot / "samples" / "LIDAR_TOP").glob("*.pcd.bin"))), None)
    if found is not None:
        return found, f"real sweep {found.name}"
    path = Path(tempfile.mkdtemp()) / "synthetic.pcd.bin"
    synthetic_sweep().tofile(path)
    return path, "SYNTHETIC sweep: no nuScenes dataroot found"


def find_images(dataroot: Path | None) -> tuple[list[Path], str]:
    """(paths of 1600x900 JPEGs, description)."""
    if dataroot is not None:
        found = [next(iter(sorted(camera.glob("*.jpg")))) for camera in sorted((dataroot / "samples").glob("CAM_*"))]
        if found:
            return found, f"{len(found)} real images"
    path = Path(tempfile.mkdtemp()) / "synthetic.jpg"
    Image.fromarray(synthetic_image()).save(path, quality=90)
    return [path], "1 SYNTHETIC image: no nuScenes dataroot found"


def synthetic_sweep(seed: int = 0) -> np.ndarray:
    """(34720, 5) float32 returns of 32 rings in firing order: ground, walls, and a quarter from the ego vehicle."""
    rng = np.random.default_rng(seed)
    azimuth = np.repeat(-np.pi + np.linspace(0, -2 * np.pi, 1085), 32)
    elevation = np.tile(np.radians(np.linspace(-30.67, 10.67, 32)), 1085)
    ground = np.where(elevation < -0.01, 1.84 / np.maximum(np.sin(-elevation), 1e-3), 1e3)
    walls = np.repeat(rng.uniform(5, 90, 155), 7 * 32) / np.cos(elevation)
    distance = np.minimum(ground, walls) + rng.normal(0, 0.02, azimuth.size)
    distance = np.where(rng.uniform(size=azimuth.size) < 0.25, rng.uniform(0.1, 0.9, azimuth.size), distance)
    flat = distance * np.cos(elevation)
    columns = (flat * np.cos(azimuth), flat * np.sin(azimuth), distance * np.sin(elevation))
    return np.stack([*columns, rng.integers(0, 100, azimuth.size), np.tile(np.arange(32), 1085)], 1).astype(np.float32)


def synthetic_image(seed: int = 0) -> np.ndarray:
    """(900, 1600, 3) uint8 with gradients, edges and texture."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:900, :1600]
    picture = np.stack([200 - y / 8, 190 - y / 10, 210 - x / 18], axis=-1)
    for _ in range(40):
        top, left = rng.integers(0, 900), rng.integers(0, 1600)
        picture[top : top + rng.integers(8, 200), left : left + rng.integers(8, 300)] = rng.uniform(20, 235, 3)
    picture += rng.normal(0, 10, (900, 1600, 1))
    for axis in (0, 1):
        picture = (np.roll(picture, 1, axis) + 2 * picture + np.roll(picture, -1, axis)) / 4
    return np.clip(picture, 0, 255).astype(np.uint8)

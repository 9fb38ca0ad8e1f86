"""Reading a sweep: a file that is not a nuScenes sweep is refused, and the error says what it is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from occfeat_targets.sources.sweeps import read_sweep
from tests.targets.test_occupancy import cloud


def turn(n: int = 4000) -> np.ndarray:
    """A sweep in firing order: one rotation of 32 rings at 10 m."""
    angle = np.linspace(0, -2 * np.pi, n, endpoint=False)
    return np.stack([10 * np.cos(angle), 10 * np.sin(angle), -np.ones(n), np.ones(n), np.arange(n) % 32], 1).astype(
        np.float32
    )


def test_a_sweep_is_read_as_it_was_written(tmp_path: Path) -> None:
    turn().tofile(tmp_path / "sweep.pcd.bin")
    points = read_sweep(tmp_path / "sweep.pcd.bin")
    assert points.dtype == np.float32
    np.testing.assert_array_equal(points, turn())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is empty; expected a multiple of 20 bytes.*restore the file"),
        (
            turn().tobytes()[:-7],
            r"has 79993 bytes, 13 past a whole return; expected a multiple of 20.*restore the file",
        ),
        (turn().tobytes()[:-2], r"has 79998 bytes, 18 past a whole return"),
    ],
    ids=["empty", "cut inside a return", "cut inside a number"],
)
def test_a_cut_sweep_is_an_error_with_its_size(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "cut.pcd.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"sweep .*cut\.pcd\.bin " + message):
        read_sweep(tmp_path / "cut.pcd.bin")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_coordinate_that_is_not_finite_is_an_error_with_its_index(tmp_path: Path, bad: float) -> None:
    points = turn()
    points[1234, 2] = bad
    points.tofile(tmp_path / "bad.pcd.bin")
    with pytest.raises(
        ValueError, match=r"bad\.pcd\.bin: 1 of 4000 returns have a NaN or infinite.*return 1234.*restore"
    ):
        read_sweep(tmp_path / "bad.pcd.bin")


def test_empty_returns_at_the_sensor_do_not_hide_a_cut(tmp_path: Path) -> None:
    nothing = turn() * np.array([0.02, 0.02, 0, 1, 1], np.float32)
    np.concatenate([turn()[:1000], nothing]).tofile(tmp_path / "cut.pcd.bin")
    with pytest.raises(ValueError, match="ends early"):
        read_sweep(tmp_path / "cut.pcd.bin")


def test_a_nan_intensity_is_accepted(tmp_path: Path) -> None:
    points = turn()
    points[7, 3] = np.nan
    points.tofile(tmp_path / "sweep.pcd.bin")
    np.testing.assert_array_equal(read_sweep(tmp_path / "sweep.pcd.bin"), points)


@pytest.mark.parametrize("part", [0.02, 0.2, 0.4, 0.5, 0.6])
def test_a_sweep_cut_between_returns_is_an_error_with_the_quadrants_it_covers(tmp_path: Path, part: float) -> None:
    turn()[: int(4000 * part)].tofile(tmp_path / "cut.pcd.bin")
    with pytest.raises(
        ValueError, match=r"cut\.pcd\.bin ends early: .* cover the quadrants \[.*x>0 y<0.*restore the file"
    ):
        read_sweep(tmp_path / "cut.pcd.bin")


def test_one_return_in_every_quadrant_is_enough(tmp_path: Path) -> None:
    points = cloud((5, 5, 0), (-5, 5, 0), (-5, -5, 0), (5, -5, 0))
    points.tofile(tmp_path / "sparse.pcd.bin")
    np.testing.assert_array_equal(read_sweep(tmp_path / "sparse.pcd.bin"), points)


def test_a_missing_or_unreadable_sweep_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sweep .*none\.pcd\.bin is missing: check the dataroot"):
        read_sweep(tmp_path / "none.pcd.bin")
    with pytest.raises(ValueError, match=r"is no regular file: restore"):
        read_sweep(tmp_path)


def returns(n: int = 4000) -> np.ndarray:
    """As `turn`, with intensities up to 255 as in a real sweep, so that only the ring column holds valid rings."""
    points = turn(n)
    points[:, :3] *= 4  # tens of metres
    points[:, 3] = np.arange(n) * 37 % 256
    return points


def assert_read(files: list[Path]) -> None:
    for file in files:
        np.testing.assert_array_equal(read_sweep(file), np.fromfile(file, np.float32).reshape(-1, 5))


def test_a_sparse_file_of_a_terabyte_a_pipe_and_a_device_are_errors_and_not_read(tmp_path: Path) -> None:
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", 1 << 40)
    with pytest.raises(
        ValueError, match=r"huge has 1,099,511,627,776 bytes, at most 67,108,864 expected: restore the file"
    ):
        read_sweep(tmp_path / "huge")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(ValueError, match=f"{path} is no regular file: restore the file"):
            read_sweep(path)


def test_every_sweep_of_the_synthetic_city_is_read(city: Path) -> None:
    files = list(city.rglob("*.pcd.bin"))
    assert len(files) > 30
    assert_read(files)


def test_every_real_sweep_is_read(real_sample: Path) -> None:
    assert_read([*real_sample.rglob("*.pcd.bin"), *real_sample.parent.glob("nuscenes-real-*/**/*.pcd.bin")])


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "float32 x, y, z, intensity, as KITTI's": lambda points: points[:, :4],
    "float32 x, y, z, intensity, ring and a sixth column": lambda points: np.c_[points, points[:, 0] / 2000],
    "float64 x, y, z, intensity, ring": lambda points: points.astype("<f8"),
    "float64 x, y, z, intensity": lambda points: points[:, :4].astype("<f8"),
    "float16 x, y, z, intensity, ring": lambda points: points.astype("<f2"),
    "big-endian float32 x, y, z, intensity, ring": lambda points: points.astype(">f4"),
    "float32 x, y, z, intensity, ring in millimetres": lambda points: points * np.float32([1000, 1000, 1000, 1, 1]),
    "float32 x, y, z, ring, intensity": lambda points: points[:, [0, 1, 2, 4, 3]],
}


@pytest.mark.parametrize("count", [4000, 4001])  # for a multiple of 5, the file size fits every layout
@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_layout_is_refused_by_name(tmp_path: Path, layout: str, count: int) -> None:
    LAYOUTS[layout](returns(count)).tofile(tmp_path / "other.pcd.bin")
    with pytest.raises(ValueError, match=f"other.pcd.bin holds {layout}; expected nuScenes' layout .*convert it"):
        read_sweep(tmp_path / "other.pcd.bin")


def test_centimetres_are_refused_and_not_reported_as_millimetres(tmp_path: Path) -> None:
    (returns(4000) * np.float32([100, 100, 100, 1, 1])).tofile(tmp_path / "other.pcd.bin")
    with pytest.raises(ValueError) as refused:
        read_sweep(tmp_path / "other.pcd.bin")
    assert "millimetres" not in str(refused.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_real_sweep_in_another_layout_is_refused_by_name(real_sample: Path, tmp_path: Path, layout: str) -> None:
    (sweep,) = (real_sample / "samples" / "LIDAR_TOP").glob("*.pcd.bin")
    points = np.fromfile(sweep, np.float32).reshape(-1, 5)
    for count in (len(points), len(points) // 10 * 10):
        LAYOUTS[layout](points[:count]).tofile(tmp_path / "other.pcd.bin")
        with pytest.raises(ValueError, match=f"holds {layout}; expected"):
            read_sweep(tmp_path / "other.pcd.bin")


@pytest.mark.parametrize(
    ("column", "value"),
    [(0, 150.1), (1, -150.1), (2, 1e30), (3, -1), (3, 256), (4, 32), (4, -1), (4, 7.5), (4, np.nan)],
)
@pytest.mark.parametrize(
    "index", [0, 63, 64, 4000]
)  # first and last of a block of the check, and the incomplete last block
def test_a_single_impossible_value_is_an_error_with_its_index(
    tmp_path: Path, column: int, value: float, index: int
) -> None:
    points = returns(4001)
    points[index, column] = value
    points.tofile(tmp_path / "bad.pcd.bin")
    with pytest.raises(ValueError, match=rf"1 of 4001 returns cannot be .*first: return {index}, .*ring 0 to 31"):
        read_sweep(tmp_path / "bad.pcd.bin")


@pytest.mark.parametrize("part", [0.1, 0.25, 0.5, 0.55])
def test_the_real_sweep_cut_between_returns_is_an_error(real_sample: Path, tmp_path: Path, part: float) -> None:
    (sweep,) = (real_sample / "samples" / "LIDAR_TOP").glob("*.pcd.bin")
    points = read_sweep(sweep)
    points[: int(part * len(points))].tofile(tmp_path / "cut.pcd.bin")
    with pytest.raises(ValueError, match="ends early"):
        read_sweep(tmp_path / "cut.pcd.bin")

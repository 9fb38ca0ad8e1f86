"""`verify` reports every kind of damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from occfeat_targets.cache.opening import open_cache
from tests.targets.command_line import build_arguments, run


@pytest.fixture(scope="module")
def sound(city: Path, tiny_teacher: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache of one shard, so that every random keyframe is in the damaged shard."""
    cache = tmp_path_factory.mktemp("sound")
    run(*build_arguments(city, cache, tiny_teacher, "--workers", "0", "--shard-size", "10"))
    return cache


@pytest.fixture(scope="module")
def cache(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the cache that tests damage and repair."""
    return Path(shutil.copytree(sound, tmp_path_factory.mktemp("verify") / "cache"))


def verify(cache: Path, *more: str, samples: int = 0):
    return run("verify", "--cache", cache, "--split", "mini_train", "--samples", str(samples), *more, check=False)


def test_a_sound_cache_is_reported_as_sound_with_the_measurements(cache):
    result = verify(cache, "--seed", "1", samples=3)
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("0 voxels wrong") == 3
    assert result.stdout.count("0 label cells wrong") == 3
    assert "SIMULATED: the data set is a synthetic city" in result.stdout
    assert "is sound" in result.stdout


def test_a_flipped_bit_in_any_file_is_found(cache):
    """Changes one random bit of every file of the cache, including metadata and records."""
    files = sorted(p for p in (cache / "mini_train.zarr").rglob("*") if p.is_file())
    assert len(files) > 25
    random = np.random.default_rng(0)
    for file in files:
        good = file.read_bytes()
        damaged = bytearray(good)
        damaged[random.integers(len(good))] ^= 1 << random.integers(8)
        file.write_bytes(damaged)
        result = verify(cache)
        file.write_bytes(good)
        assert result.returncode == 1, file
        assert file.name in result.stdout + result.stderr, file
    assert verify(cache).returncode == 0


def test_a_missing_and_a_foreign_file_are_found(cache, city, tiny_teacher):
    file = cache / "mini_train.zarr" / "features" / "c" / "0" / "0" / "0" / "0" / "0"
    file.rename(file.with_name("aside"))
    result = verify(cache)
    assert result.returncode == 1
    assert "features/c/0/0/0/0/0 is missing" in result.stdout
    assert "aside does not belong to the cache" in result.stdout
    build = run(*build_arguments(city, cache, tiny_teacher, "--workers", "0", "--shard-size", "10"), check=False)
    assert build.returncode == 1
    assert "lost 1 file of finished shards (features/c/0/0/0/0/0): restore them, or delete" in build.stderr
    file.with_name("aside").rename(file)


def rewritten(cache: Path, name: str, change) -> None:
    """Change an array of shard 0 and write it with valid checksums."""
    import zarr

    opened = open_cache(cache / "mini_train.zarr")
    group = zarr.open_group(opened.path, mode="r")
    span = slice(0, len(opened.shard_range(0)))
    arrays = {array.name: np.asarray(group[array.name][span]) for array in opened.spec.arrays()}
    arrays[name] = change(arrays[name].copy())
    opened.write_shard(0, arrays, {"skipped": {}, "cosine": None})


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        ("occupancy", lambda a: np.roll(a, 1, axis=-1), "voxels wrong"),
        ("cam_from_ego", lambda a: a + np.float32(0.01), "calibration within"),
        ("images", lambda a: a[:, ::-1].copy(), "dB of full decoding"),
        ("features", lambda a: np.roll(a, 1, axis=3), "of float32"),
        ("features", lambda a: a * np.float16(1.1), "norm ratio"),
        ("labels/vehicles", lambda a: a[:, :, ::-1].copy(), "label cells wrong"),
        ("labels/map", lambda a: np.roll(a, 1, axis=2), "label cells wrong"),
    ],
)
def test_wrong_targets_with_valid_checksums_are_found(sound, tmp_path, name, change, complaint):
    cache = Path(shutil.copytree(sound, tmp_path / "cache"))
    rewritten(cache, name, change)
    assert verify(cache).returncode == 0  # the checksums are valid
    result = verify(cache, samples=1)
    assert result.returncode == 1
    assert complaint in result.stdout
    assert "1 problem found" in result.stderr


def test_a_sweep_of_another_layout_that_the_build_accepted_is_found(broken_city, tmp_path, monkeypatch):
    for sweep in (broken_city / "samples" / "LIDAR_TOP").iterdir():
        points = np.fromfile(sweep, np.float32).reshape(-1, 5)
        points.astype(np.float64).tofile(sweep)
    monkeypatch.setattr(
        "occfeat_targets.sources.nuscenes.read_sweep", lambda path: np.fromfile(path, np.float32).reshape(-1, 5)
    )
    run(*build_arguments(broken_city, tmp_path / "cache", "none", "--workers", "0", "--rays", "--points"))
    result = verify(tmp_path / "cache", samples=2)
    assert result.returncode == 1
    # Each keyframe's sweep is listed once, although three checks read it, and the other checks go on.
    assert "2 problems found" in result.stderr and result.stdout.count("label cells wrong") == 2
    assert "is no nuScenes sweep" in result.stdout
    assert "sound" not in result.stdout


def test_the_error_for_a_moved_data_set_asks_for_dataroot(sound, city, tmp_path):
    cache = Path(shutil.copytree(sound, tmp_path / "cache"))
    result = verify(cache, "--dataroot", str(tmp_path / "gone"), samples=1)
    assert result.returncode == 1
    assert "pass --dataroot, or --samples 0" in result.stderr
    moved = Path(shutil.copytree(city, tmp_path / "moved"))
    assert verify(cache, "--dataroot", str(moved), samples=1).returncode == 0


def test_an_unfinished_cache_is_sound_so_far(city, tiny_teacher, tmp_path):
    run(*build_arguments(city, tmp_path, tiny_teacher, "--shard", "0/2"))
    result = verify(tmp_path, samples=1)
    assert result.returncode == 3
    assert "sound so far: 2 of 5 shards are not built yet" in result.stdout

import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from occfeat_targets.cache.opening import open_cache
from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.cache.shards import shard_file
from occfeat_train.cli import main
from occfeat_train.data.check import check_cache
from tests.targets.command_line import build_arguments, contents, run
from tests.train.runs import invoke, mask_camera, pretrain, refuse, steps, write_cache


def check(cache: Path, *more: str):
    return CliRunner().invoke(main, ["check", "--cache", str(cache), "--split", "mini_train", *more])


@pytest.fixture(scope="module")
def cache(city, tiny_teacher, tmp_path_factory) -> Path:
    cache = tmp_path_factory.mktemp("check")
    run(*build_arguments(city, cache, tiny_teacher, "--workers", "0"))
    return cache


def test_a_finished_cache_is_ready_and_its_statistics_are_correct(cache):
    result = check(cache)
    assert result.exit_code == 0, result.output
    assert "10 keyframes read" in result.output
    assert "SIMULATED: the data set is a synthetic city" in result.output
    readiness = check_cache(CacheReader(cache / "mini_train.zarr"), 100)
    occupied = np.unpackbits(contents(cache)["occupancy"]).sum() / 10
    assert readiness.occupied == pytest.approx(occupied)
    assert 0.5 < readiness.seen < 1
    assert 1 < readiness.views < 2


def test_a_cache_without_features_is_ready_for_finetuning(city, tmp_path):
    run(*build_arguments(city, tmp_path, "none", "--workers", "0"))
    result = check(tmp_path, "--samples", "2")
    assert result.exit_code == 0, result.output
    assert "2 keyframes read" in result.output
    assert "target features" not in result.output


def test_missing_unfinished_and_damaged_caches_are_not_ready(cache, city, tiny_teacher, tmp_path):
    assert check(tmp_path).exit_code == 1
    assert "no cache at" in check(tmp_path).output
    run(*build_arguments(city, tmp_path, tiny_teacher, "--shard", "0/2"))
    assert "2 of 5 shards are missing" in check(tmp_path).output
    copy = Path(shutil.copytree(cache, tmp_path / "copy"))
    file = copy / "mini_train.zarr" / "features" / "c" / "1" / "0" / "0" / "0" / "0"
    data = bytearray(file.read_bytes())
    data[1000] ^= 1
    file.write_bytes(data)
    result = check(copy)
    assert result.exit_code == 1
    assert "features/c/1/0/0/0/0 is damaged" in result.output


@pytest.fixture
def small(tmp_path) -> Path:
    """A cache of 7 keyframes in shards of 2, with labels."""
    write_cache(tmp_path / "small")
    return tmp_path / "small"


def test_a_cache_with_a_missing_chunk_is_neither_ready_nor_trained_on(small, tmp_path):
    for array in open_cache(small / "train.zarr").spec.arrays():
        file = shard_file(small / "train.zarr", array, 1)
        file.rename(tmp_path / "aside")
        message = refuse("check", "--cache", small, "--split", "train")
        assert f"lost 1 file of finished shards ({array.name}/c/1" in message
        if not array.name.startswith("labels/"):  # pretraining does not open them
            assert f"{array.name}/c/1" in refuse(*pretrain(small, tmp_path / "run", *steps(1)), out=tmp_path / "run")
        (tmp_path / "aside").rename(file)
    assert invoke("check", "--cache", small, "--split", "train").exit_code == 0


def test_a_cache_with_missing_chunks_of_its_mask_is_not_trained_on(small, tmp_path):
    cache = open_cache(small / "train.zarr")
    for shard in range(1, cache.num_shards):
        shard_file(cache.path, cache.spec.arrays()[0], shard).unlink()
    message = refuse(*pretrain(small, tmp_path / "run", *steps(1)), out=tmp_path / "run")
    assert "is_valid/c/1 is damaged at keyframe 2 (sample train-token2): No such file" in message


@pytest.mark.parametrize("name", ["labels/vehicles", "labels/vehicles_valid", "labels/map"])
def test_damaged_labels_are_found(small, name):
    cache = open_cache(small / "train.zarr")
    array = next(array for array in cache.spec.arrays() if array.name == name)
    file = shard_file(cache.path, array, 1)
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)
    message = refuse("check", "--cache", small, "--split", "train")
    assert f"{name}/c/1/" in message and "is damaged at keyframe 2" in message


def checked(folder: Path, masked: dict[str, list[int]], frames: tuple[str, ...]) -> str:
    """Output of 'check' on a cache in which these cameras of these keyframes are masked."""

    def mask(arrays: dict[str, np.ndarray]) -> None:
        for camera, keyframes in masked.items():
            mask_camera(arrays, keyframes, camera, frames)

    write_cache(folder, frames=frames, change=mask)
    return invoke("check", "--cache", folder, "--split", "train").output


def test_keyframes_without_a_grid_are_counted_and_without_any_left_a_cache_is_not_ready(tmp_path):
    both, every = ("CAM_FRONT", "CAM_BACK"), list(range(7))
    some = checked(tmp_path / "some", {"CAM_FRONT": [1, 2], "CAM_BACK": [2]}, both)
    assert "training leaves out 1 of 7 valid keyframes" in some
    assert "evaluation leaves out 2 of 7 valid keyframes" in some
    assert "the camera of the grid, CAM_FRONT, is masked" in some
    assert "is ready for training and evaluation" in some
    front = checked(tmp_path / "front", {"CAM_FRONT": every}, both)
    assert "evaluation leaves out 7 of 7" in front and "is ready for training\n" in front
    none = checked(tmp_path / "none", dict.fromkeys(both, every), both)
    assert "none of its 7 valid keyframes can be used: the camera of the grid, CAM_FRONT or CAM_BACK, is masked" in none
    assert "build a cache with --frames both, and use --set frame=ego" in none and "ready" not in none

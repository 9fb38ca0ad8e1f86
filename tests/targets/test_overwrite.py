"""--overwrite replaces a cache after the new build was planned, and deletes nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from occfeat_targets.cache.opening import open_cache
from occfeat_targets.cache.overwrite import replaced
from occfeat_targets.cache.records import CacheError
from tests.targets.command_line import run


def build(city: Path, cache: Path, *more: str, check: bool = True):
    options = ["--split", "mini_val", "--teacher", "none", "--no-labels", "--image-size", "48x80", "--workers", "0"]
    return run("build", "--dataroot", city, "--cache", cache, *options, *more, check=check)


def test_a_cache_of_other_options_is_replaced(city, tmp_path):
    build(city, tmp_path, "--grid", "4x16x20")
    refused = build(city, tmp_path, "--grid", "4x20x20", check=False)
    assert refused.returncode == 1 and "or pass --overwrite to replace it" in refused.stderr
    build(city, tmp_path, "--grid", "4x20x20", "--overwrite")
    assert open_cache(tmp_path / "mini_val.zarr").spec.grid.shape == (4, 20, 20)
    assert [path.name for path in tmp_path.iterdir()] == ["mini_val.zarr"]


def test_a_build_that_cannot_be_planned_leaves_the_cache_as_it_was(city, finished_cache):
    path = finished_cache.path
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    failed = build(
        city, path.parent, "--split", path.stem, "--overwrite", "--label-kinds", "map", "--scenes", "none", check=False
    )
    assert failed.returncode != 0
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    assert [other.name for other in path.parent.iterdir()] == [path.name]


def test_a_cache_whose_metadata_are_damaged_is_replaced_and_something_else_is_not(finished_cache, tmp_path):
    (finished_cache.path / "zarr.json").write_text("{")
    with replaced(finished_cache.path, overwrite=True):
        assert not finished_cache.path.exists()
    assert list(tmp_path.iterdir()) == []
    for name, content in (("zarr.json", json.dumps({"attributes": {}})), ("letter.txt", "mine")):
        other = tmp_path / f"{name}.zarr"
        other.mkdir()
        (other / name).write_text(content)
        with (
            pytest.raises(CacheError, match="is no cache of occfeat-targets, so --overwrite deletes nothing"),
            replaced(other, True),
        ):
            pass
        assert (other / name).read_text() == content


def test_without_overwrite_and_without_a_cache_nothing_happens(finished_cache, tmp_path):
    with replaced(finished_cache.path, overwrite=False):
        assert finished_cache.path.exists()
    with replaced(tmp_path / "absent.zarr", overwrite=True):
        pass
    assert finished_cache.path.exists()


def test_what_a_killed_replacement_left_is_restored_by_a_failing_one_and_deleted_by_the_next(finished_cache):
    path = finished_cache.path
    aside = path.rename(path.with_name(f"{path.name}.replaced"))
    with pytest.raises(KeyboardInterrupt), replaced(path, overwrite=True):
        raise KeyboardInterrupt
    assert path.exists() and not aside.exists()
    path.rename(aside)
    with replaced(path, overwrite=True):
        pass
    assert not path.exists() and not aside.exists()


def test_tasks_of_an_array_job_do_not_overwrite(city, tmp_path):
    options = ["--dataroot", city, "--cache", tmp_path, "--split", "mini_val"]
    refused = run("build", *options, "--overwrite", "--shard", "0/2", check=False)
    assert refused.returncode == 2 and "--overwrite and --shard" in refused.stderr

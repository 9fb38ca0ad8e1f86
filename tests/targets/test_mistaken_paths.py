"""Folders, files and sizes that a user has mixed up: each is refused, or warned of, with what was meant."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from tests.targets.command_line import build_arguments, run


@pytest.fixture(scope="module")
def cache(city, tmp_path_factory):
    path = tmp_path_factory.mktemp("built") / "cache"
    run(*build_arguments(city, path, "none", "--workers", "0"))
    return path


def refused(*arguments) -> str:
    result = run(*arguments, check=False)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    return result.stderr


def test_a_cache_is_not_built_or_looked_for_in_another_cache(city, cache):
    inner = cache / "mini_train.zarr"
    before = sorted(inner.rglob("*"))
    expected = f"{inner} is a cache itself: pass the folder above it, {cache}"
    assert expected in refused(*build_arguments(city, inner, "none"))
    for command in ("status", "verify", "info"):
        assert expected in refused(command, "--cache", inner, "--split", "mini_train")
    assert sorted(inner.rglob("*")) == before


def test_the_folder_of_the_tables_is_not_the_data_set(city, tmp_path):
    said = refused(*build_arguments(city / "v1.0-mini", tmp_path, "none"))
    assert f"v1.0-mini is the folder of the tables: pass the one above it, {city}, as --dataroot" in said


def test_a_folder_with_another_folder_named_progress_is_no_cache(city, tmp_path):
    (tmp_path / "progress").mkdir()
    run(*build_arguments(city, tmp_path, "none", "--plan-only"))


def test_a_cache_of_few_scenes_of_a_large_split_is_planned_again_without_naming_the_version(city, tmp_path):
    data, cache = shutil.copytree(city, tmp_path / "city"), tmp_path / "cache"
    arguments = [
        "build",
        "--dataroot",
        data,
        "--cache",
        cache,
        "--split",
        "train",
        "--teacher",
        "none",
        "--image-size",
        "96x160",
    ]
    run(*arguments, "--version", "v1.0-mini", "--plan-only")
    os.utime(data / "v1.0-mini" / "sample.json")
    assert "reading the tables" in run(*arguments, "--plan-only").stdout


@pytest.mark.parametrize("split", ["train", "val", "train_detect"])
def test_the_large_splits_are_not_built_from_the_small_version_unless_it_is_named(city, tmp_path, split):
    arguments = [
        "build",
        "--dataroot",
        city,
        "--cache",
        tmp_path,
        "--split",
        split,
        "--teacher",
        "none",
        "--image-size",
        "96x160",
        "--plan-only",
    ]
    assert f"has only v1.0-mini, which holds few scenes of {split}: pass --split mini_train or mini_val, or" in refused(
        *arguments
    )
    assert list(tmp_path.iterdir()) == []
    assert "scenes are not in this data set" in run(*arguments, "--version", "v1.0-mini").stdout


def test_a_dataroot_that_is_not_there_is_found_before_a_teacher_is_looked_for(tmp_path):
    assert "no directory" in refused(*build_arguments(tmp_path / "absent", tmp_path / "cache", "no/such-teacher"))


def test_verify_and_preview_use_the_data_set_of_the_cache_whatever_the_environment_says(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("NUSCENES_ROOT", str(tmp_path))
    where = ["--cache", cache, "--split", "mini_train"]
    run("verify", *where, "--samples", "1")
    run("preview", *where, "--points", "--out", tmp_path / "preview")
    assert f"{tmp_path} holds no v1.0-mini" in refused("verify", *where, "--samples", "1", "--dataroot", tmp_path)


@pytest.mark.parametrize(("size", "warned"), [("160x96", True), ("96x160", False), ("96x96", False)])
def test_images_that_would_be_mostly_black_are_warned_of(city, tmp_path, size, warned):
    arguments = build_arguments(city, tmp_path, "none", "--image-size", size, "--plan-only")
    warning = f"fill less than half of --image-size {size}, the rest is black: the order is height, then width"
    assert (warning in run(*arguments).stdout) == warned


def test_a_folder_without_a_model_is_no_teacher(city, tmp_path):
    (tmp_path / "empty").mkdir()
    for content in (None, {}):
        if content is not None:
            (tmp_path / "empty" / "config.json").write_text(json.dumps(content))
        said = refused(*build_arguments(city, tmp_path / "cache", str(tmp_path / "empty")))
        assert "None" not in said and "config.json" in said


def test_a_list_of_scenes_that_is_not_there_is_named_as_a_possible_path(city, tmp_path):
    said = refused(*build_arguments(city, tmp_path, "none", "--scenes", str(tmp_path / "absent.txt")))
    assert "correct the names or the path of the file with them" in said


def test_the_folder_of_a_probes_result_is_looked_for_before_it_is_computed(cache, tmp_path):
    said = refused("probe", "--cache", cache, "--split", "mini_train", "--json", tmp_path / "absent" / "probe.json")
    assert f"there is no folder {tmp_path / 'absent'}" in said

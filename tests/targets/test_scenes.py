"""A partial download: complete tables, and the files of some scenes only."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from occfeat_targets.cache.opening import open_cache
from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.cache.spec import CAMERAS
from occfeat_targets.sources.nuscenes import read_split
from tests.targets.command_line import build_arguments, contents, run


def files_of(city: Path, scene: str) -> list[Path]:
    split = read_split(city, "mini_train", version=None, cameras=CAMERAS, num_sweeps=1, with_boxes=False)
    keyframes = [keyframe for keyframe in split.keyframes if keyframe.scene == scene]
    return [part.path for k in keyframes for part in (*k.cameras, *k.sweeps)]


@pytest.fixture(scope="module")
def scenes(serial: Path) -> tuple[str, str]:
    """The two scenes of mini_train."""
    first, second = dict.fromkeys(open_cache(serial / "mini_train.zarr").identity.scenes)
    return first, second


@pytest.fixture
def partial(broken_city: Path, scenes: tuple[str, str]) -> Path:
    """The city without the files of its first scene."""
    for file in files_of(broken_city, scenes[0]):
        file.unlink()
    return broken_city


def test_missing_files_are_found_when_planning_and_no_cache_is_created(partial, scenes, tmp_path):
    failed = run(*build_arguments(partial, tmp_path / "cache", "none", "--workers", "0"), check=False)
    assert failed.returncode == 1
    assert f"5 of 10 keyframes, in 1 of 2 scenes ({scenes[0]}: 5 of 5) cannot be built" in failed.stderr
    assert f"with --scenes ({scenes[1]})" in failed.stderr
    assert "--on-error skip" in failed.stderr
    assert str(files_of(partial, scenes[0])[0]) in failed.stderr
    assert "is missing, and 6 more of its 7 files\n  ... and 2 more" in failed.stderr
    assert not (tmp_path / "cache").exists()


def test_a_broken_link_is_a_missing_file(broken_city, scenes, tmp_path):
    file = files_of(broken_city, scenes[1])[3]
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    arguments = build_arguments(broken_city, tmp_path / "cache", "none", "--workers", "0")
    run(*arguments)
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "elsewhere").unlink()
    failed = run(*arguments, check=False)
    assert f"1 of 10 keyframes, in 1 of 2 scenes ({scenes[1]}: 1 of 5)" in failed.stderr
    assert f"{file} is missing\n" in failed.stderr


def test_keyframes_skipped_for_missing_files_are_printed_recorded_and_masked(partial, scenes, tmp_path):
    built = run(*build_arguments(partial, tmp_path, "none", "--workers", "0", "--on-error", "skip"), check=False)
    assert built.returncode == 3
    assert f"5 of 10 keyframes, in 1 of 2 scenes ({scenes[0]}: 5 of 5) cannot be built and are skipped" in built.stdout
    reader = CacheReader(tmp_path / "mini_train.zarr")
    assert reader.is_valid.tolist() == [False] * 5 + [True] * 5
    status = run("status", "--cache", tmp_path, "--split", "mini_train", check=False).stdout
    assert status.count("is missing") == 5


def test_a_cache_contains_only_the_chosen_scenes_and_keeps_that_choice(partial, scenes, tmp_path, expected):
    cache, listed = tmp_path / "cache", tmp_path / "scenes.txt"
    arguments = build_arguments(partial, cache, "none", "--workers", "0", "--frames", "both")
    output = run(*arguments, "--scenes", scenes[1]).stdout
    assert "5 keyframes of 1 scene\n" in output
    assert "--scenes: 1 of the 2 scenes" in output
    for name, values in contents(cache).items():
        assert (values == expected[name][5:]).all(), name
    listed.write_text(f"{scenes[1]}\n# another: {scenes[0]}\n")
    assert "to build here: 0 shards" in run(*arguments, "--scenes", listed).stdout
    assert "1 scene left out by --scenes" in run("info", "--cache", cache, "--split", "mini_train").stdout
    other = run(*arguments, "--scenes", ",".join(scenes), "--on-error", "skip", check=False)
    assert other.returncode == 1
    assert "pass the same --scenes as at its first build" in other.stderr
    assert len(open_cache(cache / "mini_train.zarr")) == 5


def test_scenes_have_the_splits_order_whatever_order_they_are_named_in(city, scenes, tmp_path, expected):
    run(*build_arguments(city, tmp_path, "none", "--workers", "0", "--scenes", f"{scenes[1]}, {scenes[0]}"))
    np.testing.assert_array_equal(contents(tmp_path)["sample_token"], expected["sample_token"])


@pytest.mark.parametrize("names", ["scene-0061,scene-9999", ","])
def test_unknown_scenes_are_refused(city, tmp_path, names):
    refused = run(*build_arguments(city, tmp_path / "cache", "none", "--scenes", names), check=False)
    assert refused.returncode == 1
    assert "--scenes" in refused.stderr
    assert "scene-9999" in refused.stderr if "9999" in names else "expected" in refused.stderr
    assert not (tmp_path / "cache").exists()


def test_a_finished_cache_does_not_need_its_data_set(broken_city, scenes, tmp_path):
    arguments = build_arguments(broken_city, tmp_path / "cache", "none", "--workers", "0")
    run(*arguments)
    shutil.rmtree(broken_city / "samples")
    assert "to build here: 0 shards" in run(*arguments).stdout

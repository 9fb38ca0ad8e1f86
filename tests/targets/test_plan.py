"""The plan is made once and kept in the cache: what a later process reads, when it plans again, and what is refused before."""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from occfeat_targets.build.options import BuildOptions
from occfeat_targets.build.plan import make_plan
from occfeat_targets.build.planned import open_plan
from occfeat_targets.build.shard import ShardReport, build_shard
from occfeat_targets.cache.opening import open_cache
from occfeat_targets.cache.records import read_record, write_record
from occfeat_targets.cache.spec import CAMERAS
from occfeat_targets.sources import nuscenes
from occfeat_targets.sources.keyframe_files import (
    keyframes_from_bytes,
    keyframes_to_bytes,
)
from occfeat_targets.verify.verify import verify_checksums
from tests.kills import interrupted_at
from tests.targets.command_line import GRID, build_arguments, contents, run, table, write_table
from tests.targets.toy_source import WHERE, build

READING = "reading the tables of"


@pytest.fixture
def planned(broken_city: Path, tmp_path: Path) -> Path:
    """A cache with a plan and nothing else, of a city that a test may damage."""
    output = run(*build_arguments(broken_city, tmp_path / "cache", "none", "--plan-only", "--frames", "both")).stdout
    assert READING in output and "planned: now run the same command with --workers" in output
    return tmp_path / "cache"


def task(city: Path, cache: Path, *more: str, check: bool = True):
    return run(*build_arguments(city, cache, "none", "--frames", "both", *more), check=check)


def forbid_tables(patch: pytest.MonkeyPatch) -> None:
    def refuse(*_, **__):
        raise AssertionError("the tables were read")

    patch.setattr(nuscenes, "read_split", refuse)
    patch.setattr(nuscenes, "read_map", refuse)


@pytest.mark.parametrize("left_out", [0, 1])
def test_a_cache_keeps_the_order_of_its_scenes_in_the_data_sets_table(broken_city, tmp_path, left_out):
    """The keyframes are in the split's order. The finetuning's rules count scenes in the table's."""
    scenes = table(broken_city, "scene")
    write_table(broken_city, "scene", scenes[::-1])
    train = ["scene-0061", "scene-0553"]
    more = ["--scenes", train[0]] if left_out else []
    run(*build_arguments(broken_city, tmp_path / "cache", "none", "--plan-only", *more))
    cache = open_cache(tmp_path / "cache" / "mini_train.zarr")
    there = set(cache.identity.scenes)
    expected = [record["name"] for record in scenes[::-1] if record["name"] in there]
    assert cache.provenance["table_order"] == expected and len(expected) == 2 - left_out
    assert list(dict.fromkeys(cache.identity.scenes)) == sorted(expected)


def plan_file(cache: Path, name: str = "plan.json") -> Path:
    return cache / "mini_train.zarr" / "progress" / name


def test_tasks_verify_and_preview_of_a_planned_cache_read_no_table(
    planned, broken_city, expected, monkeypatch, tmp_path
):
    forbid_tables(monkeypatch)
    assert not open_cache(planned / "mini_train.zarr").finished_shards()
    for k in range(3):
        assert READING not in task(broken_city, planned, "--shard", f"{k}/3").stdout
    found, without = contents(planned), {"features"}
    assert found.keys() == expected.keys() - without
    assert all((found[name] == expected[name]).all() for name in found)
    for file in (broken_city / "v1.0-mini").glob("*.json"):
        if file.name != "sample.json":  # by which the data set is recognised
            file.unlink()
    where = ["--cache", planned, "--split", "mini_train"]
    verified = run("verify", *where, "--samples", "2").stdout
    assert "paths, transforms and boxes are those of the build's plan; --tables reads them" in verified
    assert verified.count(" 0 label cells wrong") == 2
    run("preview", *where, "--points", "--samples", "1", "--out", tmp_path / "preview")


def test_verify_with_tables_finds_a_plan_that_is_wrong(planned, broken_city):
    """A plan whose boxes were moved, with valid checksums, as a fault of the reader of tables would make it."""
    plan = open_plan(open_cache(planned / "mini_train.zarr"), broken_city)
    record = read_record(plan_file(planned))
    for name in [name for name in record["files"] if name.endswith(".json")]:
        file = plan_file(planned, "plan") / name
        keyframes = keyframes_from_bytes(file.read_bytes(), plan.data)
        moved = [replace(k, vehicle_corners=k.vehicle_corners + np.array([0, 5.0, 0])) for k in keyframes]
        content = keyframes_to_bytes(moved, plan.data)
        file.write_bytes(content)
        record["files"][name] = hashlib.sha256(content).hexdigest()
    write_record(plan_file(planned), record)
    task(broken_city, planned, "--workers", "0")
    where = ["verify", "--cache", planned, "--split", "mini_train", "--samples", "10", "--seed", "0"]
    assert run(*where).returncode == 0
    found = run(*where, "--tables", check=False)
    assert found.returncode == 1 and "label cells wrong" in found.stdout


@pytest.mark.parametrize(
    "damage",
    [
        lambda cache: plan_file(cache).unlink(),
        lambda cache: plan_file(cache).write_text("{"),
        lambda cache: write_record(plan_file(cache), {**read_record(plan_file(cache)), "format": 0}),
        lambda cache: plan_file(cache, "plan/00001.json").unlink(),
        lambda cache: plan_file(cache, "plan/00001.json").write_bytes(plan_file(cache, "plan/00000.json").read_bytes()),
        lambda cache: shutil.rmtree(plan_file(cache, "plan")),
    ],
    ids=["no plan", "damaged record", "another release", "lost shard", "exchanged shard", "lost files"],
)
def test_a_plan_that_is_lost_or_damaged_is_made_again(planned, broken_city, expected, damage):
    """As in a cache of an earlier release, which has none."""
    task(broken_city, planned, "--shard", "0/5")
    damage(planned)
    assert READING in task(broken_city, planned, "--workers", "0").stdout
    assert (contents(planned)["occupancy"] == expected["occupancy"]).all()
    assert run("verify", "--cache", planned, "--split", "mini_train", "--samples", "0").returncode == 0


def change_boxes(city: Path, scene_of_sample) -> None:
    boxes = table(city, "sample_annotation")
    for box in boxes:
        if scene_of_sample(box["sample_token"]):
            box["translation"][0] += 1
    write_table(city, "sample_annotation", boxes)


def test_changed_tables_are_read_again_and_refused_only_where_keyframes_are_built_already(planned, broken_city):
    tokens = open_cache(planned / "mini_train.zarr").identity.tokens
    task(broken_city, planned, "--shard", "0/5")
    change_boxes(broken_city, lambda sample: sample == tokens[4])
    assert READING in task(broken_city, planned, "--shard", "2/5").stdout
    assert READING not in task(broken_city, planned, "--shard", "2/5").stdout
    change_boxes(broken_city, lambda sample: sample == tokens[1])
    refused = task(broken_city, planned, "--shard", "3/5", check=False)
    assert refused.returncode == 1
    assert (
        f"have changed since keyframes of {planned / 'mini_train.zarr'} were built from them (sample {tokens[1]} of"
        in refused.stderr
    )


def test_a_changed_map_is_refused_once_keyframes_are_built(planned, broken_city):
    (file,) = (
        f
        for f in (broken_city / "maps" / "expansion").glob("*.json")
        if plan_file(planned, f"plan/map-{f.stem}.npz").exists()
    )
    tables = json.loads(file.read_text())
    for node in tables["node"]:
        node["x"] += 1
    task(broken_city, planned, "--shard", "0/5")
    file.write_text(json.dumps(tables))
    refused = task(broken_city, planned, "--shard", "1/5", check=False)
    assert refused.returncode == 1 and f"(the map {file})" in refused.stderr


def test_the_data_set_may_move_and_its_files_are_found_at_its_new_place(planned, broken_city, tmp_path, expected):
    moved = Path(shutil.move(broken_city, tmp_path / "elsewhere"))
    output = task(moved, planned, "--workers", "0").stdout
    assert READING not in output
    assert (contents(planned)["images"] == expected["images"]).all()


def test_options_and_teacher_are_refused_before_the_tables_are_read(planned, broken_city, monkeypatch, tmp_path):
    forbid_tables(monkeypatch)
    for options, message in [
        (["--sweeps", "3"], "num_sweeps: 1 != 3"),
        (["--shard-size", "3"], "pass --shard-size 2"),
        (["--scenes", "scene-0061"], "pass the same --scenes as at its first build"),
        (["--label-kinds", "map"], "labels: ['vehicles', 'map'] != ['map']"),
        (["--teacher", str(tmp_path / "none")], "cannot be loaded"),
    ]:
        refused = task(broken_city, planned, *options, check=False)
        assert refused.returncode == 1 and message in refused.stderr, options
    new = task(broken_city, tmp_path / "new", "--teacher", str(tmp_path / "none"), check=False)
    assert new.returncode == 1 and "cannot be loaded" in new.stderr and READING not in new.stdout


def build_part(city: Path, cache: Path, part: int) -> list[ShardReport]:
    """What one of two tasks of an array job does."""
    options = BuildOptions(
        city, cache, "mini_train", teacher=None, frames="both", shard=(part, 2), keyframes_per_shard=2, grid=GRID,
        image_size=(96, 160),
    )  # fmt: skip
    plan = make_plan(options)
    return [build_shard(plan.task(shard, device="cpu")) for shard in plan.shards]


def test_two_tasks_that_start_at_once_on_an_empty_cache_share_it(city, tmp_path, expected):
    """Processes, because filters of warnings belong to all threads of one."""
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        started = [pool.submit(build_part, city, tmp_path, part) for part in range(2)]
        reports = [report for task in started for report in task.result()]
    assert len(reports) == 5 and not any(report.error for report in reports)
    found = contents(tmp_path)
    assert all((found[name] == expected[name]).all() for name in found)


def test_a_task_looks_only_for_its_own_files_and_exits_for_its_own_keyframes(planned, broken_city):
    tokens = open_cache(planned / "mini_train.zarr").identity.tokens
    split = nuscenes.read_split(
        broken_city, "mini_train", version=None, cameras=CAMERAS, num_sweeps=1, with_boxes=False
    )
    split.keyframes[2].sweeps[0].path.unlink()
    task(broken_city, planned, "--shard", "0/5")
    failed = task(broken_city, planned, "--shard", "1/5", check=False)
    assert failed.returncode == 1 and tokens[2] in failed.stderr
    skipped = task(broken_city, planned, "--shard", "1/5", "--on-error", "skip", check=False)
    assert skipped.returncode == 3
    assert "built 1 keyframe in" in skipped.stdout
    assert "skipped 1 keyframe, which the cache holds as zeros and masks in is_valid" in skipped.stdout
    for k in (2, 3, 4):
        last = task(broken_city, planned, "--shard", f"{k}/5", "--on-error", "skip")  # exits with 0
    assert "is complete: 10 keyframes, 1 keyframe skipped, 0 keyframes with masked cameras" in last.stdout
    assert run("status", "--cache", planned, "--split", "mini_train", check=False).returncode == 3


def test_a_build_of_which_every_keyframe_was_skipped_says_that_none_was_built(toy, tmp_path):
    for image in (toy / "front").iterdir():
        image.unlink()
    built = build(toy, tmp_path, "none", "--on-error", "skip", check=False)
    assert built.returncode == 3 and "built 0 keyframes in" in built.stdout
    assert "is complete: 4 keyframes, 4 keyframes skipped" in built.stdout


def test_a_source_that_names_no_tables_is_planned_once(toy, tmp_path, monkeypatch):
    assert READING in build(toy, tmp_path, "none", "--workers", "0").stdout
    shutil.rmtree(tmp_path / "all.zarr")
    arguments = (
        "build",
        "--source",
        "toy",
        "--dataroot",
        toy,
        *WHERE,
        tmp_path,
        "--teacher",
        "none",
        "--image-size",
        "48x80",
    )
    assert READING in run(*arguments, "--plan-only").stdout
    monkeypatch.setattr("tests.targets.toy_source.ToySource.read_split", None)
    built = run(*arguments, "--workers", "0").stdout
    assert "is complete: 4 keyframes" in built and "no map labels: the toy has no maps" in built


@pytest.mark.slow
@pytest.mark.parametrize("is_new", [True, False], ids=["new cache", "cache without a plan"])
def test_a_plan_whose_writing_is_killed_anywhere_is_made_by_the_next_process(toy, tmp_path, monkeypatch, is_new):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    whole = BuildOptions(
        toy, tmp_path / "whole", "all", source="toy", teacher=None, image_size=(48, 80), keyframes_per_shard=2
    )
    record = make_plan(whole).cache.path / "progress" / "plan.json"
    expected = read_record(record)["files"]
    stopped = replace(whole, cache=tmp_path / "stopped")
    for number in itertools.count(1):
        shutil.rmtree(stopped.cache, ignore_errors=True)
        if not is_new:
            shutil.copytree(whole.cache, stopped.cache)
            shutil.rmtree(stopped.path / "progress" / "plan")
            (stopped.path / "progress" / "plan.json").unlink()
        if not interrupted_at(number, lambda: make_plan(stopped)):
            break
        if stopped.path.exists():
            assert verify_checksums(open_cache(stopped.path), progress=False).problems == []
        plan = make_plan(stopped)
        assert read_record(stopped.path / "progress" / "plan.json")["files"] == expected
        assert [k.token for shard in plan.shards for k in plan.stored.keyframes(plan.cache, shard)] == [
            f"toy{i}" for i in range(4)
        ]
    assert number > 6

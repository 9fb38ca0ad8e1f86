"""Caches of another format are refused with the command that builds them again."""

from __future__ import annotations

import json
import shlex

import numpy as np
import pytest
import zarr
from click.testing import CliRunner

from occfeat_targets.build_command import build as build_command
from occfeat_targets.cache.opening import open_cache
from occfeat_targets.cache.rebuild import rebuild_command
from occfeat_targets.cache.records import CacheError
from occfeat_targets.cache.spec import LATER, TargetSpec
from occfeat_train.cli import main as train
from tests.targets.command_line import contents, run
from tests.targets.toy_source import WHERE, build


def test_a_cache_of_another_format_is_refused_by_both_tools_with_the_command_that_rebuilds_it(
    toy, tiny_teacher, tmp_path
):
    cache = tmp_path / "some where"
    options = (
        "--sweeps",
        "2",
        "--points",
        "--feature-dtype",
        "int8",
        "--teacher-layer",
        "pre-norm",
        "--scenes",
        "scene1",
    )
    build(toy, cache, tiny_teacher, *options)
    expected = contents(cache, "all")
    file = cache / "all.zarr" / "zarr.json"
    metadata = json.loads(file.read_text())
    spec = metadata["attributes"]["occfeat"]["spec"]
    for change, reason in (({"wings": 2}, "other options (wings)"), ({"format_version": 1}, "format version 1")):
        spec |= change
        file.write_text(json.dumps(metadata))
        messages = [run("info", *WHERE, cache, check=False).stderr]
        messages.append(CliRunner().invoke(train, ["check", *WHERE, str(cache)]).output)
        for message in messages:
            assert f"which reads format version 2: it has {reason}. Use the release" in message
            command = shlex.split(message.splitlines()[-1])
            assert command[:2] == ["occfeat-targets", "build"]
    run(*command[1:], "--workers", "0")
    for name, values in contents(cache, "all").items():
        assert (values == expected[name]).all(), name
    assert run("info", *WHERE, cache).stdout.count(" left out by --scenes") == 1


def test_a_cache_of_an_earlier_release_of_this_format_is_read_and_continued(toy, tmp_path, monkeypatch):
    to_dict = TargetSpec.to_dict
    with monkeypatch.context() as earlier:
        earlier.setattr(TargetSpec, "to_dict", lambda self: {k: v for k, v in to_dict(self).items() if k not in LATER})
        build(toy, tmp_path, "none")
    stored = json.loads((tmp_path / "all.zarr" / "zarr.json").read_text())["attributes"]["occfeat"]["spec"]
    assert not stored.keys() & LATER.keys()
    (tmp_path / "all.zarr" / "progress" / "00001.json").unlink()
    assert "to build here: 1 shard, 2 keyframes" in build(toy, tmp_path, "none").stdout
    run("verify", *WHERE, tmp_path)
    run("preview", *WHERE, tmp_path, "--out", tmp_path / "preview", "--samples", "1")


def test_the_command_for_a_cache_of_the_first_format_names_all_its_options(tmp_path):
    teacher = {
        "name": "facebook/dinov2-small",
        "revision": "abc",
        "input_size": [224, 392],
        "layer": "post-norm",
        "dtype": "float32",
    }
    grid = {"shape": [8, 200, 200], "lower": [-5, -50, -50], "upper": [5, 50, 50]}
    spec = {
        "grid": grid, "frames": ["CAM_FRONT", "CAM_BACK"], "image_size": [540, 960], "teacher": teacher, "feature_dtype": "float16",
        "num_sweeps": 1, "labels": [], "dividers": "road+lane", "compat": "simple-bev", "format_version": 1,
    }  # fmt: skip
    origin = {"split": "train", "version": "v1.0-trainval", "dataroot": "/data/nuscenes"}
    attributes = {"occfeat": {"spec": spec, "keyframes_per_shard": 16, "provenance": origin}}
    zarr.create_group(tmp_path / "train.zarr", attributes=attributes)
    with pytest.raises(CacheError) as refused:
        open_cache(tmp_path / "train.zarr")
    assert str(refused.value).splitlines()[-1] == (
        f"occfeat-targets build --dataroot /data/nuscenes --cache {tmp_path} --split train --version v1.0-trainval "
        "--frames cameras --sweeps 1 --image-size 540x960 --feature-dtype float16 --dividers road+lane --compat simple-bev "
        "--shard-size 16 --teacher facebook/dinov2-small --teacher-layer post-norm --teacher-dtype float32 "
        "--feature-size 224x392 --no-labels --overwrite"
    )
    spec |= {
        "labels": ["map", "vehicles"],
        "max_points": 1,
        "rays": True,
        "instances": True,
        "source": "nuscenes",
        "grid": {**grid, "upper": [5, 40, 40]},
    }
    origin["left_out_scenes"] = ["scene-0061"]
    zarr.create_array(tmp_path / "train.zarr" / "scene", shape=(3,), dtype=str)[:] = np.array(
        ["scene-1", "scene-1", "scene-2"], object
    )
    words = shlex.split(rebuild_command(tmp_path / "train.zarr", attributes["occfeat"]))
    given = build_command.make_context("build", words[2:]).params
    asked = {
        "scenes": "scene-1,scene-2",
        "label_kinds": "map,vehicles",
        "points": True,
        "rays": True,
        "instances": True,
        "grid_range": (-5, 5, -50, 40, -50, 40),
    }
    assert {name: given[name] for name in asked} == asked
    for shard, left_out, on_error in (
        (0, {"skipped": {}, "masked": {}}, "fail"),
        (1, {"skipped": {"a": "why"}}, "skip"),
        (2, {"skipped": {}, "masked": {"b": {"front": "why"}}}, "mask-camera"),
    ):
        (tmp_path / "train.zarr" / "progress").mkdir(exist_ok=True)
        (tmp_path / "train.zarr" / "progress" / f"0000{shard}.json").write_text(json.dumps(left_out))
        words = shlex.split(rebuild_command(tmp_path / "train.zarr", attributes["occfeat"]))
        assert build_command.make_context("build", words[2:]).params["on_error"] == on_error

"""A run, its checkpoints, its results and a cache say by which command and code, where and when they were made."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest

from occfeat_targets.cache.opening import open_cache
from occfeat_targets.common import provenance
from occfeat_targets.common.provenance import describe_code, describe_origin, find_commit
from occfeat_train.training.checkpoint import find_checkpoint
from occfeat_train.training.log import read_log
from tests.conftest import REPOSITORY
from tests.targets.command_line import run as targets
from tests.train.runs import evaluate, succeed

FIELDS = ["command", "date", "host", "python", "commit", "packages", "gpus"]


def git(*arguments: str, folder=REPOSITORY) -> str:
    return subprocess.check_output(["git", "-C", str(folder), *arguments], text=True).strip()


def test_an_origin_names_this_command_and_the_installed_packages(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["occfeat-train", "pretrain", "--out", "my run"])
    origin = describe_origin(["torch", "no-such-package"], ["a GPU"])
    assert list(origin) == FIELDS
    assert origin["command"] == "occfeat-train pretrain --out 'my run'"
    assert origin["gpus"] == ["a GPU"]
    assert "torch" in origin["packages"] and "no-such-package" not in origin["packages"]
    assert timedelta(0) <= datetime.now(UTC) - datetime.fromisoformat(origin["date"]) < timedelta(minutes=10)


def test_the_commit_is_that_of_the_checkout_and_a_change_is_marked(tmp_path, monkeypatch):
    module = tmp_path / "occfeat_targets" / "common" / "provenance.py"
    module.parent.mkdir(parents=True)
    module.write_text("# 1")
    monkeypatch.setattr(provenance, "__file__", str(module))
    assert find_commit() is None  # no checkout: a wheel
    git("init", "-q", folder=tmp_path)
    git("add", "-A", folder=tmp_path)
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "first", folder=tmp_path)
    commit = git("rev-parse", "HEAD", folder=tmp_path)
    assert find_commit() == commit
    module.write_text("# 2")
    assert find_commit() == f"{commit}-dirty"
    monkeypatch.setenv("PATH", "")
    assert find_commit() is None  # no git


@pytest.mark.parametrize(
    ("origin", "text"),
    [
        ({"packages": {"occfeat": "0.1.0"}, "commit": None}, "occfeat 0.1.0"),
        ({"packages": {"occfeat": "0.1.0"}, "commit": "0123456789abcdef"}, "occfeat 0.1.0, commit 0123456789"),
        ({"packages": {}, "commit": "0123456789abcdef-dirty"}, "commit 0123456789 with changes"),
        ({}, "unknown"),
    ],
)
def test_the_code_is_described_by_release_and_commit(origin, text):
    assert describe_code(origin) == text


def test_a_run_its_checkpoints_its_results_and_each_record_of_its_log_say_when_and_how_they_were_made(
    cache, pretrained, tmp_path
):
    succeed(*evaluate(pretrained, cache, "--out", tmp_path))
    files = (pretrained / "config.json", find_checkpoint(pretrained).path / "config.json", tmp_path / "val.json")
    for file in files:
        origin = json.loads(file.read_text())["origin"]
        assert list(origin) == FIELDS
        assert origin["packages"].keys() >= {"numpy", "torch", "zarr"}
    began = datetime.fromisoformat(json.loads(files[0].read_text())["origin"]["date"])
    times = [datetime.fromisoformat(record["time"]) for record in read_log(pretrained)]
    assert began <= times[0] <= times[1] <= datetime.now(UTC)


def test_a_cache_says_when_and_how_it_was_begun(city, tmp_path):
    options = ["--cache", tmp_path, "--split", "mini_val"]
    small = ["--grid", "4x16x20", "--image-size", "48x80", "--teacher", "none", "--no-labels", "--workers", "0"]
    targets("build", "--dataroot", city, *options, *small)
    origin = open_cache(tmp_path / "mini_val.zarr").provenance
    assert origin.keys() >= set(FIELDS)
    info = targets("info", *options).stdout
    assert f"begun {origin['date']} on {origin['host']}, by {describe_code(origin)}: {origin['command']}" in info

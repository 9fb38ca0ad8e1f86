"""Paths that users give to both command lines and both Python APIs are absolute, and URLs are refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import occfeat_targets
import occfeat_train
from occfeat_targets.cli import main as targets_main
from occfeat_targets.common.paths import local_path
from occfeat_train.arguments import checked_path
from occfeat_train.cli import main as train_main

URLS = ["s3://bucket/nuscenes", "gs://bucket", "hf://datasets/a/b", "https://a.org/b", "file:///data", Path("s3://b")]


def path_parameters(command: click.Command) -> Iterator[click.Parameter]:
    if isinstance(command, click.Group):
        for name in command.commands:
            yield from path_parameters(command.commands[name])
    yield from (parameter for parameter in command.params if isinstance(parameter.type, click.Path))


@pytest.mark.parametrize("url", URLS)
def test_a_url_is_refused(url):
    with pytest.raises(ValueError, match="is a URL, and only paths on a local or mounted file system are supported"):
        local_path(url)


@pytest.mark.parametrize("path", ["data/nuscenes", "s3/b:c", "scene:0061", "../a", "/data"])
def test_other_paths_are_made_absolute_and_links_are_kept(path, tmp_path, monkeypatch):
    (tmp_path / "data").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert local_path(path) == local_path(Path(path)) == tmp_path / path


@pytest.mark.parametrize("main", [targets_main, train_main])
def test_every_path_of_the_command_line_is_absolute_and_no_url(main, tmp_path, monkeypatch):
    found = list(path_parameters(main))
    assert found
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "file").touch()
    for parameter in found:
        name = "there" if parameter.type.dir_okay else "file"
        assert parameter.type.convert(name, parameter, None) == tmp_path / name, parameter.name
        with pytest.raises(click.BadParameter, match="is a URL"):
            parameter.type.convert("s3://bucket/there", parameter, None)


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (targets_main, ["build", "--split", "train", "--dataroot", "s3://bucket/nuscenes"]),
        (targets_main, ["status", "--split", "train", "--cache", "s3://bucket/nuscenes"]),
        (targets_main, ["preview", "--split", "train", "--out", "s3://bucket/nuscenes"]),
        (train_main, ["pretrain", "--cache", "s3://bucket/nuscenes"]),
        (train_main, ["finetune", "--out", "s3://bucket/nuscenes"]),
    ],
)
def test_the_error_about_a_url_names_its_option_in_one_line(main, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    option = arguments[-2]
    assert line.startswith(f"Error: Invalid value for '{option}'")  # and its environment variable
    assert ": s3://bucket/nuscenes is a URL, and only paths on" in line
    assert not list(tmp_path.iterdir())


def test_the_python_apis_refuse_urls_and_make_paths_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="dataroot: s3://b is a URL"):
        occfeat_targets.build_cache("s3://b", "cache", "train")
    with pytest.raises(ValueError, match="cache: gs://b is a URL"):
        occfeat_targets.build_cache("data", "gs://b", "train")
    for function in (occfeat_train.load, occfeat_train.open_cache):
        with pytest.raises(ValueError, match="s3://b is a URL"):
            function("s3://b")
    assert checked_path("run", "a run") == tmp_path / "run"
    assert not list(tmp_path.iterdir())

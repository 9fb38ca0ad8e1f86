"""The help of both command lines: order of work, examples that exist, every default, readable names of values; suggestions."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from occfeat_targets.cli import main as targets_main
from occfeat_targets.common.suggest import did_you_mean
from occfeat_train.cli import main as train_main
from occfeat_train.config import Config
from occfeat_train.presets import preset
from tests.targets.command_line import run as targets
from tests.train.runs import evaluate, refuse

TOOLS = {"occfeat-targets": targets_main, "occfeat-train": train_main}


def leaves(group: click.Group, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from leaves(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(leaf for tool, group in TOOLS.items() for leaf in leaves(group, (tool,)))


def help_of(path: tuple[str, ...]) -> str:
    result = CliRunner().invoke(TOOLS[path[0]], [*path[1:], "--help"], prog_name=path[0], env={"COLUMNS": "110"})
    assert result.exit_code == 0
    return result.output


@pytest.mark.parametrize(
    ("tool", "order"),
    [
        ("occfeat-targets", "synth build status info verify preview probe"),
        ("occfeat-train", "check config pretrain finetune evaluate report figures import-reference"),
    ],
)
def test_commands_are_listed_in_the_order_of_work_with_whole_sentences_and_the_environment_variables(tool, order):
    text = help_of((tool,))
    listed = text.split("Commands:\n")[1].split("\n\n")[0].splitlines()
    assert [line.split()[0] for line in listed] == order.split()
    assert all(line.endswith(".") and not line.endswith("...") for line in listed)
    for name in ("OCCFEAT_CACHE", "OCCFEAT_TRACEBACK", "HF_HOME"):
        assert name in text.split("Environment variables:")[1]


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_has_examples_of_itself_with_options_that_it_has(path):
    text = help_of(path).split("Examples:\n")[1]
    options = {name for parameter in COMMANDS[path].params for name in parameter.opts}
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        assert tuple(words[: len(path)]) == path
        assert {word for word in words if word.startswith("--")} <= options


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_option_has_a_description_a_named_value_and_its_default(path):
    context = click.Context(COMMANDS[path], info_name=path[-1], **TOOLS[path[0]].context_settings)
    for option in (p for p in COMMANDS[path].params if isinstance(p, click.Option)):
        spec, text = option.get_help_record(context)
        assert re.sub(r"\[.*?\]", "", text).strip(), spec
        assert not re.search(r"\b(TEXT|INTEGER|FLOAT|RANGE)\b", spec)
        if not (option.is_flag or option.multiple):
            assert text.count("[default") + text.count("[required") + text.count("; default") == 1, (spec, text)


@pytest.mark.parametrize(
    ("name", "text"), [("trian", ": did you mean train?"), ("vall", ": did you mean val or vals?"), ("zzz", "")]
)
def test_names_that_resemble_are_suggested(name, text):
    assert did_you_mean(name, ["train", "val", "vals"]) == text


def test_presets_fields_and_splits_are_suggested(cache, pretrained, city, tmp_path):
    with pytest.raises(ValueError, match="no preset 'small/ocfeat': did you mean small/occfeat"):
        preset("small/ocfeat")
    with pytest.raises(ValueError, match="no preset 'nonsense'; there are: table1/simplebev-enb0/occfeat, "):
        preset("nonsense")
    with pytest.raises(ValueError, match=r"--set optim.lrr=1: no such field: did you mean optim.lr\?$"):
        Config().override(["optim.lrr=1"])
    with pytest.raises(ValueError, match=r"--set epoch=1: no such field: did you mean optim.epochs\?$"):
        Config().override(["epoch=1"])
    with pytest.raises(ValueError, match="--set xyz=1: no such field; there are task, "):
        Config().override(["xyz=1"])
    assert "(splits there: train, val): did you mean val? build it" in refuse(
        *evaluate(pretrained, cache, "--split", "vall")
    )
    build = ["--dataroot", city, "--cache", tmp_path, "--teacher", "none", "--split", "mini_trian"]
    assert "no split 'mini_trian': did you mean mini_train" in targets("build", *build, check=False).stderr

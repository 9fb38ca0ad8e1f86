"""The scenes whose labels are used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from occfeat_targets.sources.splits import split_scenes
from occfeat_train.label_rule import LabelScenesConfig
from tests.train.runs import evaluate, finetune, refuse, steps, succeed, update_digests, write_cache

LAST, FIRST, RANDOM = (LabelScenesConfig(rule) for rule in ("last-of-block", "first-of-block", "random"))  # type: ignore[arg-type]
SCENES = [f"scene-{i:04}" for i in range(1, 701)]
TRAIN = split_scenes()["train"]  # the devkit's list


def numbers(names: list[str]) -> list[int]:
    return [int(name.removeprefix("scene-")) for name in names]


@pytest.mark.parametrize(("percent", "block"), [(1, 100), (10, 10), (5, 20), (50, 2), (100, 1)])
def test_a_share_of_700_scenes_is_the_last_or_first_of_each_block(percent, block):
    assert numbers(LAST.choose(SCENES, SCENES, percent)) == list(range(block, 701, block))
    assert numbers(FIRST.choose(SCENES, SCENES, percent)) == list(range(1, 701, block))


def test_the_seven_scenes_of_one_percent_of_nuscenes_depend_on_the_rule():
    """In the order of the devkit's split."""
    assert numbers(LAST.choose(TRAIN, TRAIN, 1)) == [171, 300, 435, 589, 747, 959, 1110]
    assert numbers(FIRST.choose(TRAIN, TRAIN, 1)) == [1, 172, 301, 436, 590, 749, 960]
    last, first = (set(rule.choose(TRAIN, TRAIN, 10)) for rule in (LAST, FIRST))
    assert len(last) == len(first) == 70 and not last & first


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 900), st.sampled_from([1, 2, 4, 5, 10, 20, 25, 50, 100]))
def test_the_last_of_each_block_are_those_of_slidrs_counter(count, ratio):
    """SLidR and ALSO count the scenes of the split, and keep a scene whose number is a multiple of the ratio."""
    scenes = [str(i) for i in range(count)]
    kept = [scene for counter, scene in enumerate(scenes, 1) if counter % ratio == 0]
    assert LAST.choose(scenes, scenes, 100 / ratio) == (kept or scenes[-1:])  # at least one, where they have none


@pytest.mark.parametrize(
    ("count", "percent", "chosen"),
    [
        (750, 1, [100, 200, 300, 400, 500, 600, 700]),  # 50 scenes are no complete block
        (5, 60, [2, 4, 5]),  # 0.6, 1.2, 1.8, 2.4, 3.0
        (3, 1, [3]),  # at least one
        (1000, 0.1, [1000]),
        (1000, 33.3, None),  # the product is 332.99999999999994 in binary
    ],
)
def test_blocks_that_do_not_divide_the_split_end_where_the_share_passes_a_whole_number(count, percent, chosen):
    scenes = [f"scene-{i:04}" for i in range(1, count + 1)]
    found = numbers(LAST.choose(scenes, scenes, percent))
    assert len(found) == 333 if chosen is None else found == chosen


def test_a_scene_without_valid_keyframes_changes_the_choice_in_its_own_block_only():
    scenes = list("abcdefgh")
    assert LAST.choose(scenes, scenes, 25) == ["d", "h"]
    assert LAST.choose(scenes, set(scenes) - {"d"}, 25) == ["c", "h"]
    assert LAST.choose(scenes, set("efgh"), 25) == ["h"]  # no scene of the first block is left
    assert LAST.choose([*scenes, "i"], {"i"}, 25) == ["i"]
    assert FIRST.choose(scenes, set(scenes) - {"a"}, 25) == ["b", "e"]  # of seven scenes


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 300), st.floats(0.01, 100), st.sampled_from([FIRST, RANDOM]))
def test_a_share_has_its_size_and_no_duplicates(count, percent, rule):
    scenes = [str(i) for i in range(count)]
    chosen = rule.choose(scenes, scenes, percent)
    assert len(set(chosen)) == len(chosen) == max(round(count * percent / 100), 1)
    assert set(chosen) <= set(scenes)


def test_random_scenes_depend_only_on_their_seed_and_a_larger_share_contains_a_smaller_one():
    seven, seventy = (set(RANDOM.choose(TRAIN, TRAIN, percent)) for percent in (1, 10))
    assert len(seven) == 7 and len(seventy) == 70 and seven < seventy
    assert set(RANDOM.choose(TRAIN[::-1], TRAIN, 1)) == seven
    assert set(LabelScenesConfig("random", seed=1).choose(TRAIN, TRAIN, 1)) != seven
    left = set(RANDOM.choose(TRAIN, set(TRAIN) - seven, 1))
    assert len(left) == 7 and left < set(TRAIN) - seven


@pytest.fixture(scope="module")
def ordered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache whose data set's table has the scenes in the order c, a, b."""
    folder = tmp_path_factory.mktemp("ordered")
    write_cache(folder, dim=0, provenance={"table_order": list("cab")})
    return folder


def scenes_of(run: Path) -> str:
    return "".join((run / "scenes.txt").read_text().split())


def third(cache: Path, out: Path, *more: object) -> list[str]:
    """A finetuning with one of the three scenes."""
    return finetune(cache, out, "--labels", "34", *steps(1), *more)


@pytest.mark.parametrize(
    ("options", "scene", "how"),
    [
        ([], "b", "last of each block, table order"),
        (["--scene-order", "split"], "c", "last of each block, split order"),
        (["--label-rule", "first-of-block"], "c", "first of each block, table order"),
        (["--label-rule", "first-of-block", "--scene-order", "split"], "a", "first of each block, split order"),
        (["--set", "label_scenes.rule=first-of-block"], "c", "first of each block, table order"),
        (["--label-rule", "random"], "c", "random, seed 0"),
        (["--label-rule", "random", "--seed", "1"], "c", "random, seed 0"),
        (["--label-rule", "random", "--label-seed", "1"], "a", "random, seed 1"),
    ],
)
def test_options_choose_the_rule_and_the_order_of_the_scenes(ordered, tmp_path, options, scene, how):
    out = tmp_path / "run"
    output = succeed(*third(ordered, out, *options))
    assert f"labels: 1 of 3 scenes ({how}), listed in {out / 'scenes.txt'}" in output
    assert scenes_of(out) == scene
    assert json.loads((out / "config.json").read_text())["data"]["label scenes"] == how


def test_chosen_scenes_are_listed_in_the_splits_order(ordered, tmp_path):
    succeed(*finetune(ordered, tmp_path / "run", "--labels", "70", "--label-rule", "first-of-block", *steps(1)))
    assert scenes_of(tmp_path / "run") == "ac"  # the table's first two are c and a


def test_a_cache_without_the_tables_order_counts_in_the_splits_and_says_so(cache, tmp_path):
    note = "does not say in which order the data set's own table has its scenes"
    output = succeed(*third(cache, tmp_path / "run"))
    assert f"{cache / 'train.zarr'} {note}" in output and "as with --scene-order split" in output
    assert "labels: 1 of 3 scenes (last of each block, split order)" in output and scenes_of(tmp_path / "run") == "c"
    (tmp_path / "list").write_text("a\n")
    for options in (["--scene-order", "split"], ["--label-rule", "random"], ["--scenes", tmp_path / "list"]):
        assert note not in succeed(*third(cache, tmp_path / str(options[1]).replace("/", "-"), *options))
    assert note not in succeed(*finetune(cache, tmp_path / "all", *steps(1)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--label-seed", "1"], "--label-seed is for --label-rule random: add that option"),
        (["--label-rule", "random", "--scenes", "LIST"], "--scenes is the list of scenes: leave --label-rule out"),
        (["--scene-order", "split", "--scenes", "LIST"], "--scenes is the list of scenes: leave --scene-order out"),
        (["--set", "label_scenes.rule=last"], "rule='last': one of last-of-block, first-of-block, random expected"),
        (["--set", "label_scenes.seed=-1"], "label_scenes.seed=-1: a whole number from 0"),
    ],
)
def test_options_of_label_scenes_that_mean_nothing_are_refused(ordered, tmp_path, options, message):
    (tmp_path / "list").write_text("a\n")
    given = [str(tmp_path / "list") if option == "LIST" else option for option in options]
    assert message in refuse(*third(ordered, tmp_path / "run", *given))


def test_a_cache_without_a_valid_keyframe_is_refused(tmp_path):
    write_cache(tmp_path, dim=0, change=lambda arrays: arrays["is_valid"].fill(False))
    assert "train.zarr: no valid keyframe among the 7: build it again" in refuse(*third(tmp_path, tmp_path / "run"))


def as_written_by_an_earlier_release(run: Path) -> None:
    """Remove what that release did not save."""
    for file in (run / "config.json", *run.glob("checkpoints/step-*/config.json")):
        info = json.loads(file.read_text())
        del info["config"]["label_scenes"]
        info["data"]["label scenes"] = "evenly spread"
        file.write_text(json.dumps(info))
    for folder in run.glob("checkpoints/step-*"):
        update_digests(folder)


def test_a_run_of_an_earlier_release_had_the_first_of_each_block_in_the_splits_order(ordered, tmp_path):
    out, earlier = tmp_path / "run", ["--label-rule", "first-of-block", "--scene-order", "split"]
    succeed(*third(ordered, out, *earlier))
    as_written_by_an_earlier_release(out)
    message = refuse(*third(ordered, out))
    assert "(first of each block, split order) != " in message and "(last of each block, table order)" in message
    assert "finished already" in succeed(*third(ordered, out, *earlier))
    assert 'label_scenes.rule="first-of-block"' in succeed("config", "show", out)
    write_cache(tmp_path / "val", "val", dim=0)
    succeed(*evaluate(out, tmp_path / "val"))


def test_runs_that_use_the_same_scenes_continue_whatever_chose_them(ordered, tmp_path):
    for name, options in (("all", ["--labels", "100"]), ("third", ["--labels", "34", "--scene-order", "split"])):
        out = tmp_path / name
        succeed(*finetune(ordered, out, *options, *steps(1)))
        if name == "all":
            as_written_by_an_earlier_release(out)
        again = finetune(ordered, out, "--labels", options[1], *steps(1), "--label-rule", "first-of-block")
        assert "finished already" in succeed(*again)  # all scenes, or scene c

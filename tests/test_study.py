"""The study of pretraining: its design, its statistics, its processes, and every step in miniature."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

from occfeat_train.presets import preset
from pipelines.processes import STOPPED, Job, run_jobs
from pipelines.study.__main__ import main
from pipelines.study.design import (
    ARMS,
    IMG_ALSO,
    LONGER,
    NONE,
    OCCFEAT,
    OCCFEAT_LONGER,
    OCCUPANCY,
    TASKS,
    Arm,
    Run,
    runs_of,
    slug,
    teachers_of,
)
from pipelines.study.report import markdown
from pipelines.study.results import CLAIMS, Difference, gain_shrinks, judge, mean_and_spread, paired, read_scores, table
from pipelines.study.search import CANDIDATES, search_runs
from pipelines.study.sizes import SIZES
from tests.conftest import REPOSITORY

BOTH = {"trained", "random"}


def config_of(run: Run):
    options = list(run.options)
    sets = [options[k + 1] for k, option in enumerate(options) if option == "--set"]
    return preset(options[options.index("--preset") + 1]).override(sets)


@pytest.mark.parametrize("size", SIZES.values(), ids=list(SIZES))
def test_every_run_trains_the_declared_steps(size):
    for run in [*runs_of(size, BOTH), *search_runs(size)]:
        config = config_of(run)
        samples = size.city.samples(run.labels)
        assert config.optim.num_steps(samples) == run.steps
        assert config.seed == run.seed
        assert config.labels == run.labels
        assert config.task == (run.task or "occfeat") or run.arm.name == IMG_ALSO


def test_arms_of_a_seed_differ_only_in_their_start():
    size = SIZES["gpu"]
    of_cell = [r for r in runs_of(size, BOTH) if (r.seed, r.task, r.labels) == (1, "map", 10) and r.arm.longer == 1]
    assert len(of_cell) == len(ARMS) - 2
    assert len({run.options for run in of_cell}) == 1
    pretrained = [a for a in ARMS if a.pretrain is not None and a.name != OCCFEAT_LONGER]
    assert {run.after for run in of_cell} == {""} | {f"{slug(a.name)}-1" for a in pretrained}


def test_controls_are_finetuned_three_times_as_long_from_the_same_pretraining():
    runs = runs_of(SIZES["gpu"], BOTH)
    of_cell = {r.arm.name: r for r in runs if (r.seed, r.task, r.labels) == (0, "map", 10)}
    steps = {name: run.steps for name, run in of_cell.items()}
    assert steps[LONGER] == steps[OCCFEAT_LONGER] == 3 * steps[NONE] == 3 * steps[OCCFEAT]
    assert of_cell[OCCFEAT_LONGER].after == of_cell[OCCFEAT].after == "occfeat-0" != of_cell[LONGER].after == ""
    assert [r.name for r in runs if r.arm.name == OCCFEAT_LONGER and not r.task] == []
    assert of_cell[LONGER].options == of_cell[OCCFEAT_LONGER].options


def test_arms_of_an_absent_teacher_are_left_out():
    names = {run.arm.name for run in runs_of(SIZES["gpu"], {"random"})}
    assert names == {NONE, LONGER, OCCUPANCY, IMG_ALSO} | {arm.name for arm in ARMS if arm.teacher == "random"}
    assert teachers_of(replace(SIZES["gpu"], arms=(Arm(NONE, None), Arm(OCCUPANCY, ("--occ-only",))))) == set()


def test_runs_are_distinct_and_seeds_come_one_after_the_other():
    runs = runs_of(SIZES["gpu"], BOTH)
    assert len({run.name for run in runs}) == len(runs)
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)


def test_the_search_never_uses_the_reported_scenes():
    runs = search_runs(SIZES["cpu"])
    assert {run.split for run in runs} == {"tune"}
    assert {run.split for run in runs_of(SIZES["cpu"], BOTH)} == {"held_out"}
    assert len({run.options for run in runs}) == len(runs) == len(CANDIDATES) * len(TASKS)


def test_paired_difference_is_students_t():
    scipy_stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for n in (2, 3, 5, 10):
        a, b = rng.normal(size=(2, n))
        difference = paired(dict(enumerate(a)), dict(enumerate(b)))
        low, high = scipy_stats.t.interval(0.95, n - 1, np.mean(a - b), scipy_stats.sem(a - b))
        assert difference.mean == pytest.approx(np.mean(a - b))
        assert difference.mean - difference.half_width == pytest.approx(low, rel=1e-3)
        assert difference.mean + difference.half_width == pytest.approx(high, rel=1e-3)


def test_only_common_seeds_are_paired():
    assert paired({0: 5.0, 1: 7.0}, {1: 4.0, 2: 0.0}) == Difference(3.0, 1, None)
    assert paired({0: 5.0}, {1: 4.0}) is None


@pytest.mark.parametrize(
    ("better", "verdict"),
    [((5, 5.1, 4.9), "shown"), ((-5, -5.1, -4.9), "contradicted"), ((5, -5, 1), "not shown"), ((5,), "not shown")],
)
def test_verdicts(better, verdict):
    assert paired(dict(enumerate(better)), dict.fromkeys(range(3), 0.0)).verdict == verdict


def test_claims_are_judged_by_their_cells():
    scores = {
        (OCCFEAT, "map", 1): {0: 10.0, 1: 10.2, 2: 9.9},
        (NONE, "map", 1): {0: 1.0, 1: 1.1, 2: 1.0},
        (OCCUPANCY, "map", 1): {0: 10.0, 1: 9.0, 2: 11.0},
    }
    first, *others = judge(scores, [1])
    assert first == "Pretraining with OccFeat helps (Table 1): shown for map 1 % (+9.0 [+8.8, +9.2])."
    assert any("better than occupancy alone (Table 3): not shown for map 1 %" in sentence for sentence in others)
    assert not any("features alone" in sentence for sentence in others)  # no results


def test_the_gain_with_few_labels_is_compared_with_that_of_many():
    scores = {(arm, "map", share): {s: base + s for s in range(3)} for (arm, share), base in
              {(OCCFEAT, 1): 9.0, (NONE, 1): 1.0, (OCCFEAT, 10): 9.0, (NONE, 10): 6.0}.items()}  # fmt: skip
    assert gain_shrinks(scores, OCCFEAT, NONE, "map", 1, 10) == Difference(5.0, 3, 0.0)
    longer = {OCCFEAT: OCCFEAT_LONGER, NONE: LONGER}
    scores |= {(longer[arm], task, share): {s: 2 * v for s, v in c.items()} for (arm, task, share), c in scores.items()}
    few = "OccFeat helps more with 1 % of the labels than with 10 %"
    assert judge(scores, [1, 10])[-2:] == [
        f"{few} (Table 1): shown for map (+5.0 [+5.0, +5.0]).",
        f"{few}, after 3 times the steps (Table 1): shown for map (+10.0 [+10.0, +10.0]).",
    ]


def test_every_claim_is_about_arms_that_exist():
    names = {arm.name for arm in ARMS}
    assert all({claim.better, claim.worse} <= names for claim in CLAIMS)


def test_tables():
    scores = {(NONE, "map", 1): {0: 1.0, 1: 3.0}, (OCCFEAT, "map", 1): {0: 2.0, 1: 6.0}}
    assert table(scores, [NONE, OCCFEAT], [1]) == [
        ["pretraining", "vehicles 1 %", "map 1 %"],
        [NONE, "-", f"2.0 ± {math.sqrt(2):.1f}"],
        [OCCFEAT, "-", f"4.0 ± {math.sqrt(8):.1f}"],
    ]
    assert table(scores, [NONE, OCCFEAT], [1], NONE)[1:] == [[OCCFEAT, "-", "+2.0 [-10.7, +14.7]"]]
    assert mean_and_spread({}) == "-"
    assert markdown([["a", "b"], ["1", "2"]]) == "| a | b |\n|---|---|\n| 1 | 2 |"


def test_unfinished_runs_are_left_out_and_a_lost_iou_counts_as_zero(tmp_path):
    first, second = [r for r in runs_of(SIZES["cpu"], set()) if r.task == "vehicles"][:2]
    file = tmp_path / "runs" / first.name / "evaluation" / "held_out.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"iou": None}))
    assert read_scores([first, second], tmp_path) == {(first.arm.name, "vehicles", first.labels): {0: 0.0}}


def job(name: str, tmp_path: Path, *arguments: str, after: str = "") -> Job:
    return Job(name, (arguments,), tmp_path / f"{name}.log", (after,) if after else ())


def test_a_failed_job_does_not_stop_those_that_do_not_need_it(tmp_path):
    jobs = [
        job("bad", tmp_path, "occfeat_train", "config", "show", "no-such-preset"),
        job("needs bad", tmp_path, "occfeat_train", "config", "list", after="bad"),
        Job("good", (("occfeat_train", "config", "list"), ("occfeat_train", "config", "show", "small/occfeat")), tmp_path / "good.log"),
    ]  # fmt: skip
    with pytest.raises(click.ClickException, match=r"2 of 3 jobs failed") as error:
        run_jobs(jobs, 1)
    assert "bad: occfeat_train config exited with 1" in error.value.message
    assert "needs bad: needs bad" in error.value.message
    assert "no preset 'no-such-preset'" in (tmp_path / "bad.log").read_text()
    assert not (tmp_path / "needs bad.log").exists()
    log = (tmp_path / "good.log").read_text()
    assert log.startswith("$ python -m occfeat_train config list\n")
    assert "optim.lr=" in log


def test_no_job_begins_after_the_deadline(tmp_path, capsys):
    run_jobs([job("late", tmp_path, "occfeat_train", "config", "list")], 1, deadline=0.0)
    assert not (tmp_path / "late.log").exists()
    assert "1 job not begun" in capsys.readouterr().out


def test_jobs_that_need_one_that_needs_a_failed_one_are_named(tmp_path):
    jobs = [
        job("a", tmp_path, "occfeat_train", "config", "show", "no-such-preset"),
        job("b", tmp_path, "occfeat_train", "config", "list", after="a"),
        job("c", tmp_path, "occfeat_train", "config", "list", after="b"),
    ]
    with pytest.raises(click.ClickException, match=r"3 of 3 jobs failed(?s:.)*c: needs b"):
        run_jobs(jobs, 2)


@pytest.mark.slow
def test_a_study_that_is_stopped_ends_its_workers(tmp_path):
    """A training of a million steps runs in a worker, of which SIGTERM to the study leaves nothing but a checkpoint."""
    out = tmp_path / "study"
    study("--out", str(out), "--only-seed", "0", "--stop-after", "0")
    code = (
        f"from pathlib import Path; from pipelines.processes import *; out = Path({str(out)!r}); run_jobs([Job('long', (("
        "'occfeat_train', 'pretrain', '--preset', 'small/occfeat', '--occ-only', '--cache', str(out / 'cache' / 'random'), "
        "'--set', 'network.image_size=32x48', '--set', 'network.channels=8', '--batch', '2', '--epochs', '1000000', '--out', "
        "str(out / 'runs' / 'long'), '--no-tensorboard', '--save-every', '1000000'),), out / 'long.log')], 1)"
    )
    process = subprocess.Popen([sys.executable, "-c", f"if __name__ == '__main__': {code}"], cwd=REPOSITORY)
    log = out / "runs" / "long" / "log.jsonl"
    while not (log.is_file() and log.read_text().count("\n") > 2):
        assert process.poll() is None
        time.sleep(0.2)
    process.terminate()
    assert process.wait(60) == STOPPED
    assert len(list((out / "runs" / "long" / "checkpoints").glob("step-*"))) == 1


def study(*arguments: str) -> str:
    result = CliRunner().invoke(main, [*arguments, "--size", "tiny", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
def test_a_tiny_study_runs_resumes_and_reports(tmp_path):
    out = tmp_path / "study"
    printed = study("--out", str(out), "--only-seed", "0", "--jobs", "2")
    assert "SIMULATED: the data set is a synthetic city, and the teacher has random weights" in printed
    assert "left out, because they need --teacher: features only, OccFeat," in printed
    assert "of 1 seed;" in printed
    finished = {file: file.stat().st_mtime_ns for file in out.rglob("held_out.json")}
    assert len(finished) == 5 + 2 * 7

    lost = out / "runs" / "none-0-map-100" / "evaluation" / "held_out.json"
    lost.unlink()
    assert "13 finished" in study("--out", str(out), "--only-seed", "0")
    again = {file: file.stat().st_mtime_ns for file in out.rglob("held_out.json")}
    assert {file for file in finished if again[file] != finished[file]} == {lost}

    logs = {file: file.stat().st_size for file in (out / "logs").iterdir()}
    reported = study(
        "--out", str(out), "--report-only", "--seeds", "1", "--teacher", "unused", "--teacher-name", "a teacher"
    )
    assert "SIMULATED: a synthetic city; teacher: a teacher" in reported
    assert "19 finished runs of 1 seed" in reported
    assert logs == {file: file.stat().st_size for file in (out / "logs").iterdir()}  # nothing is run
    text, page = (out / "report.md").read_text(), (out / "report.html").read_text()
    assert "| none |" in text
    assert "cosine of the mean feature" in text
    assert page.count("<img") >= 1 + 5 + 2  # cameras, maps, curves
    assert page.index("IoU at 0.5 [%], mean") < page.index("<img") < page.index("judged here")


@pytest.mark.slow
def test_the_search_prints_its_table(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.study.search.STEPS", 2)
    monkeypatch.setattr("pipelines.study.search.CANDIDATES", {"as it is": {}, "batch 4": {"optim.batch": "4"}})
    printed = study("--out", str(tmp_path / "study"), "--search")
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[:2] for row in rows[1:]] == [["| as it is", "2 of 2"], ["| batch 4", "2 of 4"]]
    assert " - |" not in rows[1]
    assert "0 of" not in (tmp_path / "study" / "logs" / "search-as-it-is-map.log").read_text()

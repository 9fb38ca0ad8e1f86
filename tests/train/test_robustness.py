"""evaluate --corruptions: closed forms of mCE and mRR, and whole evaluations of a tiny run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from occfeat_targets.cache.corruption import CORRUPTIONS, SEVERITIES, CorruptionSpec
from occfeat_train.tasks.robustness import corruption_errors, mean_of_all, means, resilience_rates
from tests.train.runs import VAL_SCENES, evaluate, finetune, refuse, steps, succeed, write_cache, write_caches

ALL = {name: dict.fromkeys(SEVERITIES, 20.0) for name in CORRUPTIONS}


def test_a_run_is_as_good_as_itself_and_keeps_its_score_without_loss():
    assert mean_of_all(corruption_errors(ALL, ALL)) == pytest.approx(100)
    assert mean_of_all(resilience_rates(ALL, 20.0)) == pytest.approx(100)


def test_mce_and_mrr_are_ratios_of_sums_over_severities():
    scores = {"fog": {1: 30.0, 2: 20.0, 3: 10.0}}
    baseline = {"fog": {1: 20.0, 2: 10.0, 3: 0.0}}
    assert means(scores) == {"fog": pytest.approx(20)}
    assert corruption_errors(scores, baseline)["fog"] == pytest.approx(100 * (0.7 + 0.8 + 0.9) / (0.8 + 0.9 + 1.0))
    assert resilience_rates(scores, 40.0)["fog"] == pytest.approx(100 * (0.3 + 0.2 + 0.1) / (3 * 0.4))
    whole, errors = {**ALL, "fog": scores["fog"]}, {**ALL, "fog": baseline["fog"]}
    expected = (7 * 100 + 100 * 2.4 / 2.7) / 8
    assert mean_of_all(corruption_errors(whole, errors)) == pytest.approx(expected)


def test_a_missing_severity_gives_no_mean_and_a_zero_no_rate():
    partial = {**ALL, "snow": {1: 20.0, 3: 20.0}}
    assert "snow" not in means(partial) and len(means(partial)) == 7
    assert mean_of_all(corruption_errors(partial, ALL)) is None
    assert mean_of_all(resilience_rates(partial, 20.0)) is None
    assert resilience_rates(ALL, 0.0) == {}
    assert "fog" not in corruption_errors(ALL, {**ALL, "fog": dict.fromkeys(SEVERITIES, 100.0)})


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clean caches, and three corrupted ones with random images."""
    folder = write_caches(tmp_path_factory.mktemp("caches"), dim=0, labels=("vehicles",))
    for severity in SEVERITIES:
        write_corrupted(folder, CorruptionSpec("fog", severity))
    return folder


def write_corrupted(folder: Path, corruption: CorruptionSpec, shards: int | None = None, to: str | None = None) -> None:
    """to: its folder, if it is another than the build's."""

    def change(arrays):
        arrays["images"] //= 1 + corruption.severity

    options = {"dim": 0, "labels": ("vehicles",), "scenes": VAL_SCENES, "seed": 1, "change": change, "shards": shards}
    write_cache(folder / (to or corruption.folder), "val", corruption=corruption, **options)


@pytest.fixture(scope="module")
def runs(caches: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    out = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        succeed(*finetune(caches, out / f"seed-{seed}", "--seed", seed, *steps(1)))
    return [out / "seed-0", out / "seed-1"]


def test_corruptions_are_evaluated_once_and_compared_with_the_baseline(caches, runs):
    run, baseline = runs
    arguments = evaluate(run, caches, "--corruptions", caches / "corruptions")
    first = succeed(*arguments)
    assert "4 evaluations of 4 to do, 20 samples" in first and "SIMULATED: all of it" in first
    assert (
        "missing in" in first
        and "brightness-1" in first
        and "fog-1" not in first.split("missing in")[1].splitlines()[0]
    )
    results = json.loads((run / "corruptions.json").read_text())
    assert results["mRR"] is None and "mCE" not in results and len(results["missing"]) == 21
    assert results["simulated"] == ["SIMULATED: all of it"]
    assert results["corruptions"]["fog-2"]["protocol"] == "native"
    for severity in SEVERITIES:
        where = caches / f"corruptions/fog-{severity}"
        output = succeed(*evaluate(run, where, "--out", where / "out"))
        assert f"images corrupted: fog, severity {severity}" in output
        alone = json.loads((where / "out" / "val.json").read_text())
        assert results["scores"]["fog"][str(severity)] == alone["iou"]
        assert alone["corruption"]["severity"] == severity
    assert results["mean"]["fog"] == pytest.approx(sum(results["scores"]["fog"].values()) / 3)
    both = succeed(*arguments, "--baseline", baseline)
    assert "4 evaluations of 8 to do" in both
    again = json.loads((run / "corruptions.json").read_text())
    theirs = json.loads((baseline / "corruptions.json").read_text())
    assert again["scores"] == results["scores"] and again["baseline"]["mean"] == theirs["mean"]
    error = 100 * (100 - again["mean"]["fog"]) / (100 - theirs["mean"]["fog"])
    assert again["corruption_error"] == {"fog": pytest.approx(error)} and again["mCE"] is None
    row = next(line for line in both.splitlines() if line.startswith("fog"))
    assert row.split() == ["fog", *(f"{v:.1f}" for v in results["scores"]["fog"].values()), *(f"{v:.1f}" for v in (
        results["mean"]["fog"], results["resilience_rate"]["fog"], theirs["mean"]["fog"], error))]  # fmt: skip
    assert "0 evaluations of 8 to do" in succeed(*arguments, "--baseline", baseline)
    (run / "corruptions.json").write_text("{}")
    assert "4 evaluations of 8 to do" in succeed(*arguments, "--baseline", baseline)


def test_results_of_other_weights_are_not_kept(caches, runs):
    run = runs[1]
    succeed(*evaluate(run, caches, "--corruptions", caches / "corruptions"))
    results = json.loads((run / "corruptions.json").read_text())
    results["evaluations"]["fog-1"]["weights"] = "others"
    (run / "corruptions.json").write_text(json.dumps(results))
    assert "1 evaluation of 4 to do" in succeed(*evaluate(run, caches, "--corruptions", caches / "corruptions"))


def test_what_cannot_be_compared_is_refused(caches, runs, pretrained, cache, tmp_path):
    run, corruptions = runs[0], caches / "corruptions"
    assert "no corrupted cache of val at" in refuse(*evaluate(run, caches, "--corruptions", tmp_path))
    fog = corruptions / "fog-1"
    assert "holds corrupted images: pass the clean" in refuse(*evaluate(run, fog, "--corruptions", corruptions))
    assert "is a pretraining" in refuse(*evaluate(pretrained, cache, "--corruptions", corruptions))
    assert "--baseline is for --corruptions" in refuse(*evaluate(run, caches, "--baseline", run))
    assert "--out: the results of" in refuse(*evaluate(run, caches, "--corruptions", corruptions, "--out", tmp_path))
    write_cache(
        tmp_path / "fog-1", "val", corruption=CorruptionSpec("fog", 1), dim=0, labels=("vehicles",), scenes=VAL_SCENES, first=9
    )  # fmt: skip
    assert "has other keyframes than" in refuse(*evaluate(run, caches, "--corruptions", tmp_path))


@pytest.mark.parametrize(
    ("corruption", "folder", "expected"),
    [
        (CorruptionSpec("fog", 2), "fog-3", "holds fog-2, but its folder says fog-3"),
        (CorruptionSpec("fog", 2), "snow-2", "holds fog-2, but its folder says snow-2"),
        (CorruptionSpec("snow", 1, protocol="network"), "snow-1", "has protocol native, * has protocol network"),
        (CorruptionSpec("snow", 1, seed=3), "snow-1", "has seed 0, * has seed 3"),
        (
            CorruptionSpec("frame-lost", 1, masks_lost=True),
            "frame-lost-1",
            "has masks_lost False, * has masks_lost True",
        ),
    ],
)
def test_caches_under_a_wrong_name_or_of_several_kinds_are_refused(
    caches, runs, tmp_path, corruption, folder, expected
):
    for one in (CorruptionSpec("fog", 1), CorruptionSpec("camera-crash", 1)):
        write_corrupted(tmp_path, one)
    write_corrupted(tmp_path, corruption, to=f"corruptions/{folder}")
    output = refuse(*evaluate(runs[0], caches, "--corruptions", tmp_path / "corruptions"))
    before, _, after = expected.partition("*")
    assert before in output and after in output.split(before)[1]
    assert f"{folder}/val.zarr" in output


def test_a_clean_cache_among_corrupted_ones_is_refused(caches, runs, tmp_path):
    write_cache(tmp_path / "fog-1", "val", dim=0, labels=("vehicles",), scenes=VAL_SCENES, seed=1)
    assert "holds clean images, but its folder says fog-1" in refuse(
        *evaluate(runs[0], caches, "--corruptions", tmp_path)
    )


def test_another_protocol_seed_or_masking_has_results_of_its_own(caches, runs, tmp_path):
    run = runs[0]
    succeed(*evaluate(run, caches, "--corruptions", caches / "corruptions"))
    first = (run / "corruptions.json").read_bytes()
    masked = [
        CorruptionSpec("snow", 1),
        CorruptionSpec("camera-crash", 1, masks_lost=True),
    ]  # only lost views are masked
    for kind, specs in {
        "corruptions-network": [CorruptionSpec("fog", 1, protocol="network")],
        "corruptions-seed-3": [CorruptionSpec("fog", 1, seed=3)],
        "corruptions-masked": masked,
    }.items():
        for spec in specs:
            write_corrupted(tmp_path, spec, to=f"{kind}/{spec.name}-{spec.severity}")
        assert f"written to {run / kind}.json" in succeed(*evaluate(run, caches, "--corruptions", tmp_path / kind))
        assert json.loads((run / f"{kind}.json").read_text())["scores"].keys() == {spec.name for spec in specs}
    assert (run / "corruptions.json").read_bytes() == first


def test_a_cache_that_is_not_finished_is_missing_and_the_others_are_evaluated(caches, runs, tmp_path):
    write_corrupted(tmp_path, CorruptionSpec("fog", 2, seed=5), shards=1)
    arguments = evaluate(runs[0], caches, "--corruptions", tmp_path / "corruptions-seed-5")
    output = refuse(*arguments)
    assert "no finished corrupted cache of val" in output and "not finished: fog-2" in output
    write_corrupted(tmp_path, CorruptionSpec("fog", 1, seed=5))
    output = succeed(*arguments)
    assert output.count("fog-2 (not finished), fog-3,") == 2  # before and below the table
    results = json.loads((runs[0] / "corruptions-seed-5.json").read_text())
    assert results["scores"]["fog"].keys() == {"1"} and results["not_finished"] == ["fog-2"]
    assert "fog-2" in results["missing"] and "fog-1" not in results["missing"]

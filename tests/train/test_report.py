import base64
import io
import json
import re
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.common.provenance import describe_code, describe_origin
from occfeat_train.cli import main
from occfeat_train.config import Config
from occfeat_train.report import figures
from occfeat_train.report.page import curves
from occfeat_train.report.pretraining import cosine_of_mean
from occfeat_train.report.runs import evenly_spread
from occfeat_train.report.tables import speed_table
from occfeat_train.tasks.pretraining import Pretraining
from tests.targets.command_line import run as targets

GRID = VoxelGrid((2, 12, 10), (-1, -6, -5), (1, 6, 5))
SMALL = [
    "--set",
    "network.image_size=32x48",
    "--set",
    "network.channels=8",
    "--backbone-weights",
    "none",
    "--batch",
    "2",
]
QUIET = ["--no-tensorboard", "--no-progress", "--loader-threads", "1", "--device", "cpu"]


def invoke(*arguments: str | Path):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def succeed(*arguments: str | Path) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def work(city, tiny_teacher, tmp_path_factory) -> Path:
    """A cache, a pretraining, and two finetunings from it: vehicles, evaluated, and map. Each has one to three steps."""
    work = tmp_path_factory.mktemp("report")
    for split in ("mini_train", "mini_val"):
        targets(
            "build", "--dataroot", city, "--cache", work, "--split", split, "--teacher", tiny_teacher, "--frames", "ego",
            "--grid", "4x16x20", "--range", "-4", "4", "-16", "16", "-20", "20", "--image-size", "48x80",
            "--feature-size", "56x98", "--shard-size", "5", "--workers", "0",
        )  # fmt: skip
    common = ["--cache", work, "--split", "mini_train", *QUIET]
    succeed("pretrain", *common, *SMALL, "--epochs", "0.6", "--validate", "mini_val", "--out", work / "pre")
    for task in ("vehicles", "map"):
        short = ["--labels", "50", "--from", work / "pre", "--epochs", "1", "--batch", "2", "--out", work / task]
        succeed("finetune", *common, *short, "--task", task)
    succeed("evaluate", work / "vehicles", "--cache", work, "--split", "mini_val", *QUIET[1:])
    return work


def report(work: Path, *runs: str | Path, split: str = "mini_val"):
    return invoke(
        "report", *runs, "--cache", work, "--split", split, "--out", work / "report.html", "--samples", "1", "--device", "cpu"
    )  # fmt: skip


@pytest.fixture(scope="module")
def page(work) -> str:
    result = report(work, work / "pre", work / "vehicles", work / "map")
    assert result.exit_code == 0, result.output
    return (work / "report.html").read_text()


def section(page: str, heading: str) -> str:
    """The text below a heading, up to the next heading of the same or a higher level."""
    start = re.search(rf"<h([234])>{heading}", page)
    assert start is not None, heading
    rest = page[start.end() :]
    end = re.search(rf"<h[2-{start[1]}]>", rest)
    return rest[: end.start()] if end else rest


def test_the_page_marks_simulated_data_and_lists_differences_from_the_paper(page):
    assert '<p class="simulated">SIMULATED: the data set is a synthetic city' in page
    introduction = page.split("<h2>")[0]
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", introduction, re.DOTALL)]
    found = {(field, runs): (here, paper) for field, here, paper, runs in rows[1:]}
    assert "<code>table1/simplebev-enb0/occfeat</code>: pre; " in introduction
    assert found["network.image_size", "all"] == ("32x48", "224x400")
    assert found["network.channels", "all"] == ("8", "128")
    assert found["network.weights", "all"] == ("none", "default")
    assert found["optim.batch", "pre"] == ("2", "16")
    assert found["frame", "all"] == ("ego", "cameras")
    assert found["targets.grid.shape", "all"] == ("4x16x20", "8x200x200")
    assert found["targets.teacher.input_size", "pre"] == ("56x98", "224x392")
    assert found["data.simulated", "all"][0].startswith("the data set is a synthetic city")
    assert found["data.split", "all"] == ("mini_train", "train")
    assert found["measured on: split", "all"] == ("mini_val", "val")
    assert ("labels", "vehicles, map") in found
    assert ("occfeat: network.channels", "vehicles, map") in found


def test_the_page_needs_no_other_file(page):
    assert not re.search(r"<script|<link|https?://|src=\"(?!data:)", page)
    assert (
        page.count("<img") == len(re.findall(r'<img class="[^"]*" alt="[^"]+" src="data:image/png;base64,', page)) > 20
    )


def test_pictures_in_the_page_are_valid(page):
    from PIL import Image

    for text in re.findall(r"base64,([^\"]+)", page):
        Image.open(io.BytesIO(base64.b64decode(text))).verify()


def test_every_section_has_its_pictures(page):
    training, keyframe = section(page, "Training"), section(page, "Keyframe 0")
    for name in ("loss", "occupancy loss", "feature loss", "learning rate", "validation: occupancy IoU"):
        assert f'alt="{name}' in section(training, "Pretraining")
    vehicles = section(training, "Vehicles")
    assert "waiting for data" in vehicles and "time in steps" in vehicles
    assert "minus the mean cosine" in section(training, "Pretraining") and "minus the mean cosine" not in vehicles
    code, host = describe_code(describe_origin([])), socket.gethostname()
    assert f"<td>{host}, CPU</td><td>{code}</td>" in vehicles
    assert 'alt="CAM_FRONT_LEFT, CAM_FRONT' in keyframe
    pretraining = section(keyframe, "Pretraining")
    for caption in ("true occupancy", "predicted occupancy", "columns", "all cells from behind", "target features", "predicted features"):  # fmt: skip
        assert f'alt="pre: {caption}' in pretraining
    assert "mean cosine" in pretraining
    assert "probability" in section(keyframe, "Vehicles")
    assert section(keyframe, "Map").count("<img") == 2 + 5


def test_metrics_equal_those_of_evaluate(work, page):
    results = json.loads((work / "vehicles" / "evaluation" / "mini_val.json").read_text())
    table = section(page, "Vehicles: the whole split")
    header, (row,) = re.findall(r"<th>(.*?)</th>", table), [re.findall(r"<td>(.*?)</td>", table)]
    found = dict(zip(header, row, strict=True))
    assert found["IoU at 0.5 [%]"] == f"{results['iou']:.1f}"
    assert found["IoU at the best threshold [%]"] == f"{results['iou_best']:.1f} ({results['threshold_best']:g})"
    assert "evaluation/mini_val.json" in table
    assert "pretrained: pre, step 3" in table
    assert "50 % (5 keyframes)" in table
    assert "evaluated for this report" in section(page, "Map: the whole split")


@pytest.mark.parametrize(
    "other",
    [{"step": 99}, {"frames": ["CAM_BACK"]}, {"cache": "another"}, {"keyframes": "others"}, {"weights": "others"}],
)
def test_results_of_another_checkpoint_frame_or_cache_are_not_used(work, tmp_path, other):
    copy = shutil.copytree(work / "vehicles", tmp_path / "vehicles")
    file = copy / "evaluation" / "mini_val.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **other, "iou": 77.7}))
    assert report(work, copy).exit_code == 0
    table = section((work / "report.html").read_text(), "Vehicles: the whole split")
    assert "77.7" not in table
    assert "evaluated for this report" in table


def test_wrong_input_is_an_error_of_one_line(work, tmp_path):
    logless = shutil.copytree(work / "pre", tmp_path / "logless", ignore=shutil.ignore_patterns("log.jsonl"))
    checkpoint = next((work / "pre" / "checkpoints").iterdir())
    for path, message in (
        (work / "absent", "absent"),
        (logless, "no log.jsonl with a training step"),
        (checkpoint, "not one of its checkpoints"),
    ):
        result = report(work, path)
        assert result.exit_code == 1
        assert result.output.startswith("error: ")
        assert message in result.output
        assert result.output.count("\n") == 1
    assert "no cache at" in report(work, work / "pre", split="val").output


def test_broken_runs_and_damaged_lines_of_logs_are_left_out_and_listed(work, tmp_path):
    flipped, hurt = (shutil.copytree(work / "vehicles", tmp_path / name) for name in ("flipped", "hurt"))
    weights = next((flipped / "checkpoints").iterdir()) / "model.safetensors"
    weights.write_bytes(b"x" + weights.read_bytes()[1:])
    log = hurt / "log.jsonl"
    log.write_text("damaged\n" + log.read_text())
    (hurt / "evaluation" / "mini_val.json").write_text("{")
    (tmp_path / "notes.txt").touch()
    result = report(work, flipped, work / "pre", tmp_path / "notes.txt", work / "absent", hurt)
    assert result.exit_code == 0, result.output
    page = (work / "report.html").read_text()
    for line in (
        f"{flipped} is left out: {weights} is damaged",
        f"{tmp_path / 'notes.txt'} is left out: {tmp_path / 'notes.txt'} is a file",
        f"{work / 'absent'} is left out: no checkpoint in",
        f"{log} has 1 damaged line (1), left out",
    ):
        assert line in result.output and line in page
    assert "2 runs on mini_val" in page
    assert "evaluated for this report" in section(page, "Vehicles: the whole split")


def test_a_task_without_pictures_is_reported_by_its_metric_and_curves(work, monkeypatch):
    monkeypatch.setattr(Pretraining, "pictures", "")
    assert report(work, work / "pre").exit_code == 0
    page = (work / "report.html").read_text()
    assert "mean cosine" in section(page, "Pretraining: the whole split")
    assert section(page, "Training").count("<img") >= 4
    assert section(page, "Keyframe 0").count("<img") == 1


def test_names_are_escaped(work, tmp_path):
    copy = shutil.copytree(work / "vehicles", tmp_path / "<b>&run")
    assert report(work, copy).exit_code == 0
    page = (work / "report.html").read_text()
    assert "&lt;b&gt;&amp;run" in page
    assert "<b>&run" not in page


def test_the_topmost_voxel_of_a_column_is_shown():
    volume = np.zeros(GRID.shape, np.bool_)
    volume[0, 3, 3] = volume[:, 3, 4] = volume[1, 3, 5] = True
    voxels = np.flatnonzero(volume)
    shades = np.arange(3 * len(voxels), dtype=np.uint8).reshape(-1, 3)
    expected = shades[voxels.tolist().index(np.ravel_multi_index((1, 3, 4), GRID.shape))]
    assert (figures.topmost(voxels, shades, GRID)[3, 4] == expected).all()


def test_outcomes_have_different_colours_and_invalid_cells_are_grey():
    predicted, true = np.array([1, 1, 0, 0, 1], bool), np.array([1, 0, 1, 0, 0], bool)
    colors = figures.outcome_colors(predicted, true, np.array([1, 1, 1, 1, 0], bool))
    assert colors.tolist() == [list(c) for c in (figures.HIT, figures.FALSE_ALARM, figures.MISSED, figures.EMPTY, figures.UNSCORED)]  # fmt: skip
    mixed = figures.outcome_shares(predicted[None], true[None], 1)
    assert mixed[0] == pytest.approx((np.array(figures.HIT) + 2.0 * np.array(figures.FALSE_ALARM) + figures.MISSED) / 4, abs=1)  # fmt: skip


def test_one_vector_for_every_voxel_reaches_the_cosine_that_the_page_states():
    features = np.random.default_rng(0).standard_normal((50, 8)) + 1
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    fixed = unit.mean(0) / np.linalg.norm(unit.mean(0))
    assert cosine_of_mean(features) == pytest.approx((unit @ fixed).mean())
    assert cosine_of_mean(np.ones((3, 4))) == pytest.approx(1)


def test_times_are_those_of_the_steps_and_of_the_clock():
    steps = [{"step": i, "loss": 1.0, "epoch": 1.0, "samples_per_s": 0.5, "data_wait": 0.1} for i in range(3)]
    times = [f"2026-01-01T00:0{i}:30.000+00:00" for i in range(3)]
    info = SimpleNamespace(num_samples=9)
    run: Any = SimpleNamespace(checkpoint=SimpleNamespace(info=info), config=Config())
    run.log = [{**step, "time": time} for step, time in zip(steps, times, strict=True)]
    header, (row,) = speed_table([run])
    found = dict(zip(header, row, strict=True))
    assert found["time in steps"] == "0:01:36"  # three steps of 16 samples at 0.5 samples/s
    assert found["from first to last step"] == "0:02:00"
    run.log = steps  # of an older release
    assert speed_table([run])[1][0][-1] == "-"


def test_a_running_mean_keeps_a_constant_and_averages_fewer_values_at_the_ends():
    assert figures.smooth([2.0] * 9, 3) == pytest.approx([2.0] * 9)
    assert figures.smooth([0, 1, 2, 3, 4], 1) == pytest.approx([0.5, 1, 2, 3, 3.5])
    assert figures.smooth([5, 7], 0) == pytest.approx([5, 7])


def test_curves_are_read_from_steps_or_from_validations():
    log = [
        {"step": 0, "loss": 3.0, "data_wait": 1.0},
        {"step": 0, "validation": {"iou": 20.0, "loss": 9.0, "best": None}},
    ]
    log.append({"step": 1, "loss": 2.0})
    assert curves(log) == {
        "loss": ([0, 1], [3.0, 2.0]),
        "validation: IoU at 0.5 [%]": ([0], [20.0]),
        "validation: loss": ([0], [9.0]),
    }


def test_keyframes_of_the_report_are_spread_over_the_split():
    assert evenly_spread(np.arange(10, 21), 3) == [10, 15, 20]
    assert evenly_spread(np.array([4, 9]), 5) == [4, 9]

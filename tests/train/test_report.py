import base64
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from occfeat_targets.grid import VoxelGrid
from occfeat_train import figures
from occfeat_train.cli import main
from occfeat_train.outputs import evenly_spread
from occfeat_train.report import curve, differences_from_paper, initial_weights
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
QUIET = ["--no-tensorboard", "--no-progress", "--workers", "1", "--device", "cpu"]


def invoke(*arguments: str | Path):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def succeed(*arguments: str | Path) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def work(city, tiny_teacher, tmp_path_factory) -> Path:
    """A cache, a pretraining, two finetunings of it (vehicles, evaluated; map), of one to three steps each."""
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
    """What stands under a heading of any level, up to the next of that level or above."""
    start = re.search(rf"<h([234])>{heading}", page)
    assert start is not None, heading
    rest = page[start.end() :]
    end = re.search(rf"<h[2-{start[1]}]>", rest)
    return rest[: end.start()] if end else rest


def test_the_page_says_in_red_what_is_not_real_and_lists_what_is_smaller(page):
    assert '<p class="simulated">SIMULATED: the data set is a synthetic city' in page
    assert "images 32x48 instead of 224x400" in page
    assert "8 channels instead of 128" in page
    assert "grid 4x16x20" in page
    assert "backbone from random weights" in page


def test_the_page_needs_nothing_but_itself(page):
    assert not re.search(r"<script|<link|https?://|src=\"(?!data:)", page)
    assert page.count("<img") == len(re.findall(r'<img class="[^"]*" alt="[^"]+" src="data:image/png;base64,', page))


def test_every_section_has_its_pictures(page):
    training, keyframe = section(page, "Training"), section(page, "Keyframe 0")
    for name in ("loss", "occupancy loss", "feature loss", "learning rate", "validation: occupancy IoU"):
        assert f'alt="{name}' in section(training, "Pretraining")
    assert "waiting for data" in section(training, "Vehicles")
    assert 'alt="CAM_FRONT_LEFT, CAM_FRONT' in keyframe
    pretraining = section(keyframe, "Pretraining")
    for caption in ("true occupancy", "predicted occupancy", "columns", "all cells from behind", "target features", "predicted features"):  # fmt: skip
        assert f'alt="{caption}' in pretraining
    assert "mean cosine" in pretraining
    assert "probability" in section(keyframe, "Vehicles")
    assert section(keyframe, "Map").count("<img") == 2 + 5


def test_figures_of_merit_are_those_of_evaluate(work, page):
    results = json.loads((work / "vehicles" / "evaluation" / "mini_val.json").read_text())
    table = section(page, "Vehicles: the whole split")
    assert f"<b>{results['iou']:.1f}</b>" in table
    assert f"{results['iou_best']:.1f} ({results['threshold_best']:g})" in table
    assert "evaluation/mini_val.json" in table
    assert "pretrained: pre, step 3" in table
    assert "50 % (5 keyframes)" in table
    assert "evaluated for this report" in section(page, "Map: the whole split")


@pytest.mark.parametrize("other", [{"step": 99}, {"frames": ["CAM_BACK"]}, {"cache": "another"}])
def test_results_of_another_checkpoint_frame_or_cache_are_not_used(work, tmp_path, other):
    copy = shutil.copytree(work / "vehicles", tmp_path / "vehicles")
    file = copy / "evaluation" / "mini_val.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **other, "iou": 77.7}))
    assert report(work, copy).exit_code == 0
    table = section((work / "report.html").read_text(), "Vehicles: the whole split")
    assert "77.7" not in table
    assert "evaluated for this report" in table


def test_wrong_input_is_one_line(work, tmp_path):
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


def test_one_occupied_cell_ahead_on_the_right_is_upper_right_in_the_picture():
    from PIL import Image

    volume = np.zeros(GRID.shape, np.bool_)
    volume[1, 10, 8] = True  # forward 4..5 m, right 3..4 m
    colors = figures.highest_colors(volume)
    upright = figures.foremost_first(colors)
    assert np.argwhere((upright != figures.EMPTY).any(-1)).tolist() == [[1, 8]]
    pixels = {
        name: np.asarray(Image.open(io.BytesIO(figures.draw_map(c, GRID, np.eye(4)))).convert("RGB"), np.int64)
        for name, c in {"cell": colors, "empty": np.full_like(colors, figures.EMPTY)}.items()
    }
    rows, columns = np.nonzero((pixels["cell"] != pixels["empty"]).any(-1))
    assert len(rows) > 50
    assert rows.max() < 0.35 * pixels["cell"].shape[0]
    assert columns.min() > 0.7 * pixels["cell"].shape[1]


def test_a_column_has_the_colour_of_its_highest_cell():
    volume = np.zeros(GRID.shape, np.bool_)
    volume[0, 3, 3] = volume[:, 3, 4] = volume[1, 3, 5] = True
    low, both, high = figures.highest_colors(volume)[3, 3:6].tolist()
    assert low != both == high
    voxels = np.flatnonzero(volume)
    shades = np.arange(3 * len(voxels), dtype=np.uint8).reshape(-1, 3)
    expected = shades[voxels.tolist().index(np.ravel_multi_index((1, 3, 4), GRID.shape))]
    assert (figures.topmost(voxels, shades, GRID)[3, 4] == expected).all()


def test_outcomes_are_told_apart_and_cells_that_do_not_count_are_grey():
    predicted, true = np.array([1, 1, 0, 0, 1], bool), np.array([1, 0, 1, 0, 0], bool)
    colors = figures.outcome_colors(predicted, true, np.array([1, 1, 1, 1, 0], bool))
    assert colors.tolist() == [list(c) for c in (figures.HIT, figures.FALSE_ALARM, figures.MISSED, figures.EMPTY, figures.UNSCORED)]  # fmt: skip
    mixed = figures.outcome_shares(predicted[None], true[None], 1)
    assert mixed[0] == pytest.approx((np.array(figures.HIT) + 2.0 * np.array(figures.FALSE_ALARM) + figures.MISSED) / 4, abs=1)  # fmt: skip


def test_predictions_that_point_where_the_targets_do_have_their_colours():
    rng = np.random.default_rng(0)
    targets = rng.normal(size=(50, 8))
    colors = figures.FeatureColors.fit(targets)
    assert (colors(targets) == colors(targets * rng.uniform(0.1, 9, (50, 1)))).all()
    assert len(np.unique(colors(targets), axis=0)) > 40
    assert (colors(-targets) != colors(targets)).any()


def test_colours_follow_the_largest_component():
    angle = np.linspace(-0.5, 0.5, 41)
    targets = np.stack([np.cos(angle), np.sin(angle), 0 * angle, 0 * angle], 1)
    red = figures.FeatureColors.fit(targets)(targets)[:, 0].astype(int)
    assert (np.diff(red) >= 0).all()
    assert red.min() == 0
    assert red.max() == 255


def test_a_running_mean_leaves_a_line_as_it_is_and_averages_fewer_at_the_ends():
    assert figures.smooth([2.0] * 9, 3) == pytest.approx([2.0] * 9)
    assert figures.smooth([0, 1, 2, 3, 4], 1) == pytest.approx([0.5, 1, 2, 3, 3.5])
    assert figures.smooth([5, 7], 0) == pytest.approx([5, 7])


def test_curves_read_steps_and_validations_apart():
    log = [{"step": 0, "loss": 3.0}, {"step": 0, "validation": {"iou": 20.0}}, {"step": 1, "loss": 2.0}]
    assert curve(log, "loss") == ([0, 1], [3.0, 2.0])
    assert curve(log, "iou") == ([0], [20.0])
    assert curve(log, "cosine") == ([], [])


def test_initial_weights_are_named_without_directories():
    assert initial_weights("/a/b/runs/pre/checkpoints/step-00000042 (pretrain)") == "pretrained: pre, step 42"
    assert initial_weights("backbone weights: none") == "none (random)"
    assert initial_weights("backbone weights: google/efficientnet-b0") == "backbone weights: google/efficientnet-b0"


def test_shown_keyframes_are_spread_over_the_split():
    assert evenly_spread(np.arange(10, 21), 3) == [10, 15, 20]
    assert evenly_spread(np.array([4, 9]), 5) == [4, 9]


def test_what_the_paper_did_differs_in_nothing():
    from occfeat_train.checkpoint import About, Checkpoint
    from occfeat_train.presets import PRESETS

    for name, config in PRESETS.items():
        about = About(config, VoxelGrid(), 384, "0" * 8, 28130, "backbone weights: default")
        assert bool(differences_from_paper(Checkpoint(Path("step-1"), about))) == name.startswith("small/"), name


def test_pictures_in_the_page_are_whole(page):
    from PIL import Image

    data = re.findall(r"base64,([^\"]+)", page)
    assert len(data) > 20
    for text in data:
        Image.open(io.BytesIO(base64.b64decode(text))).verify()

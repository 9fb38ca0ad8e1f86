"""The table of label kinds: requirements on a row, and a new kind that needs one row only."""

import dataclasses
import json

import numpy as np
import pytest
import zarr
from PIL import Image

import occfeat_train
from occfeat_targets.cache.geometry import inverse_rigid, transform
from occfeat_targets.cache.labels import LABEL_KINDS, LabelKind
from occfeat_targets.cache.spec import TargetSpec
from tests.conftest import SMALL_GRID
from tests.targets.command_line import build_arguments, run
from tests.train.runs import evaluate, finetune, succeed

RADIUS = 5.0  # [m]


def draw_ring(keyframe, spec, grid_from_ego, geometry):
    """Two toy classes: cells within RADIUS of the ego vehicle, and cells farther away. Cells behind it are not valid."""
    up = transform(grid_from_ego, np.zeros(3))[2]
    centers = spec.grid.voxel_centers()[0].astype(np.float64)
    centers[..., 2] = up
    ahead, left, _ = np.moveaxis(transform(inverse_rigid(grid_from_ego), centers), -1, 0)
    is_near = ahead**2 + left**2 <= RADIUS**2
    return np.stack([is_near, ~is_near]), ahead >= 0


def reference_ring(keyframe, spec, grid_from_ego, geometry):
    (_, rows, columns), (_, rear, left_edge), (_, length, width) = spec.grid.shape, spec.grid.lower, spec.grid.cell_size
    masks, is_valid = np.zeros((2, rows, columns), np.bool_), np.zeros((rows, columns), np.bool_)
    for row in range(rows):
        for column in range(columns):
            forward, right = rear + (row + 0.5) * length, left_edge + (column + 0.5) * width
            masks[int(np.hypot(forward, right) > RADIUS), row, column] = (
                True  # the grid is in the ego frame, without rotation
            )
            is_valid[row, column] = forward >= 0
    return masks, is_valid, np.ones_like(is_valid)


def draw_ring_with_a_wrong_cell(*arguments):
    masks, is_valid = draw_ring(*arguments)
    masks[0, 3, 4] ^= True
    return masks, is_valid


RING = LabelKind(
    name="ring",
    classes=("near", "far"),
    colors={"far": (240, 240, 240), "near": (90, 120, 0)},
    draw=f"{__name__}:draw_ring",
    reference=f"{__name__}:reference_ring",
    description="cells near the ego vehicle and far from it",
    invalid="behind the ego vehicle",
)


@pytest.fixture
def ring(monkeypatch) -> LabelKind:
    monkeypatch.setitem(LABEL_KINDS, "ring", RING)
    return RING


def test_a_new_kind_of_labels_is_one_row(city, ring, tmp_path):
    options = ["--cache", tmp_path, "--split", "mini_train"]
    output = run(*build_arguments(city, tmp_path, "none", "--workers", "0", "--label-kinds", "vehicles,ring")).stdout
    assert "labels: vehicles, ring" in output
    info = run("info", *options).stdout
    assert "1x2x100x13 uint8    cells near the ego vehicle and far from it" in info
    assert "0: behind the ego vehicle, not scored" in info
    assert "0 label cells wrong" in run("verify", *options, "--samples", "1").stdout

    path = tmp_path / "mini_train.zarr"
    sample = occfeat_train.open_cache(path)[0]
    assert sample["ring"].shape == (1, 2, 100, 100)
    assert sample["ring"][0, 0].sum() * 0.25 == pytest.approx(np.pi * RADIUS**2, rel=0.03)
    assert sample["ring_valid"][0].float().mean() == 0.5
    assert zarr.open_group(path)["labels/ring"].metadata.dimension_names[2] == "ring_class"

    run("preview", *options, "--samples", "1", "--out", tmp_path / "preview")
    picture = np.asarray(Image.open(next((tmp_path / "preview").glob("*.png"))).convert("RGB"))
    assert (picture == ring.colors["near"]).all(axis=-1).sum() > 1000

    trained = tmp_path / "run"
    succeed(*finetune(tmp_path, trained, "--split", "mini_train", "--task", "ring", "--epochs", "0.2"))
    succeed(*evaluate(trained, tmp_path, "--split", "mini_train"))
    assert list(json.loads((trained / "evaluation" / "mini_train.json").read_text())["per_class"]) == ["near", "far"]


def test_the_reference_of_a_new_kind_finds_a_wrong_cell(city, ring, tmp_path, monkeypatch):
    wrong = dataclasses.replace(ring, draw=f"{__name__}:draw_ring_with_a_wrong_cell")
    monkeypatch.setitem(LABEL_KINDS, "ring", wrong)
    run(*build_arguments(city, tmp_path, "none", "--workers", "0", "--label-kinds", "ring"))
    found = run("verify", "--cache", tmp_path, "--split", "mini_train", "--samples", "1", check=False)
    assert found.returncode == 1
    assert "1 label cell wrong" in found.stdout


def test_a_spec_has_the_arrays_of_its_kinds_in_the_tables_order(ring):
    spec = TargetSpec(grid=SMALL_GRID, labels=("ring", "map", "vehicles"))
    labels = {array.name: array.shape for array in spec.arrays() if array.name.startswith("labels/")}
    assert labels == {
        "labels/vehicles": (1, 20, 2),
        "labels/vehicles_valid": (1, 20, 2),
        "labels/map": (1, 5, 20, 2),
        "labels/ring": (1, 2, 20, 2),
        "labels/ring_valid": (1, 20, 2),
    }
    assert list(labels) == [name for kind in LABEL_KINDS.values() for name in kind.arrays]


def test_a_kind_needs_a_colour_for_each_class():
    with pytest.raises(ValueError, match="expected one colour for each class"):
        dataclasses.replace(RING, colors={"near": (0, 0, 0)})

"""Differences of a run from the paper's rows."""

import dataclasses
import json
from typing import Any

import pytest

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.config import NO_AUGMENTATION, Config
from occfeat_train.label_rule import LABEL_CHOICE
from occfeat_train.presets import PRESETS, preset
from occfeat_train.training.checkpoint import RunInfo
from occfeat_train.training.paper import DATA, TARGETS, differences, evaluation_differences, nearest_row


def about_of(config: Config, *, size: tuple[int, int] = (540, 960), **changes: Any) -> RunInfo:
    """RunInfo of a config on the paper's data."""
    targets = {**TARGETS.to_dict(), "image_size": list(size), "max_points": 40_000}
    values = {"feature_dim": 384, "cache": "", "num_samples": 28_130, "initial": "", "targets": targets, "data": DATA}
    return RunInfo(config, VoxelGrid(), **{**values, **changes})


def found_in(info: RunInfo) -> dict[str, tuple[str, str]]:
    return {d.field: (d.here, d.paper) for d in differences(info)}


@pytest.mark.parametrize("name", list(PRESETS))
def test_the_papers_presets_have_no_differences_from_the_paper(name):
    has_other_network = name.startswith(("small/", "simple-bev/")) or name in (
        "scale/student-rn101",
        "scale/wide-decoder",
    )
    assert bool(differences(about_of(preset(name), preset=name))) == has_other_network


def test_options_that_lead_to_a_row_of_the_paper_are_compared_with_it():
    base = preset("table1/simplebev-enb0/occfeat")
    assert nearest_row(about_of(base.override(["loss.feat=0.1"]))) == "table4/lambda-0.1"
    assert nearest_row(about_of(base.override(["network.backbone=resnet-50"]))) == "table1/simplebev-rn50/occfeat"
    assert nearest_row(about_of(preset("table1/bevformer-enb0/map-10"))) == "table1/bevformer-enb0/map-10"
    everything = preset("table1/simplebev-enb0/vehicles-100").override(
        ["optim.epochs=1", "optim.batch=1", "optim.lr=1"]
    )
    assert nearest_row(about_of(everything)) == "table1/simplebev-enb0/vehicles-100"
    for name in ("table1/simplebev-enb0/occfeat", "table1/simplebev-enb0/occfeat-100ep"):
        assert nearest_row(about_of(base.override(["optim.epochs=75"]), preset=name)) == name


OTHER = {str: "other", bool: None, int: 7, float: 0.5}
LITERAL = {
    "task": None, "loss.occ_on": "observed", "loss.occlusion": "zbuffer", "loss.heads": "simple-bev", "optim.accumulate": "sum", "network.lifting": "lss", "network.backbone": "resnet-101", "network.compat": "simple-bev",
    "network.efficientnet": "torch",
    "optim.optimizer": "adamw", "optim.schedule": "onecycle", "frame": "ego", "label_scenes.rule": "random", "label_scenes.order": "split", "precision": "float32",
    "network.recompute": True, "compile": True, "network.channels": 64, "network.image_size": [64, 112], "augment.resize": [1, 1],
}  # fmt: skip


@pytest.mark.parametrize("field", [name for name in Config().flat() if name != "task"])
def test_a_difference_in_any_field_of_the_config_is_reported(field):
    """Also in fields of later releases. Fields that only affect the computation are excluded."""
    value = Config().flat()[field]
    other = LITERAL.get(field, not value if isinstance(value, bool) else OTHER.get(type(value)))
    base = preset("table1/simplebev-enb0/vehicles-100") if field == "loss.heads" else Config()
    config = base.override([f"{field}={json.dumps(other)}"])
    targets = {**TARGETS.to_dict(), "rays": True}  # which some fields need
    computing = ("network.recompute", "precision", "compile", "seed", "allow_upsampling", "teacher")
    is_left_out = field in computing or field in LABEL_CHOICE  # compared as one value, see below
    assert list(found_in(about_of(config, targets=targets))) == ([] if is_left_out else [field])


def test_another_choice_of_label_scenes_is_a_difference_where_a_share_is_used():
    one = preset("table1/simplebev-enb0/vehicles-1")
    usual = "last of each block, table order"
    for change, here in (
        ("rule=first-of-block", "first of each block, table order"),
        ("order=split", "last of each block, split order"),
        ("rule=random", "random, seed 0"),
    ):
        assert found_in(about_of(one.override([f"label_scenes.{change}"]))) == {"data.label scenes": (here, usual)}
        for other in ("table1/simplebev-enb0/vehicles-100", "table1/simplebev-enb0/occfeat"):
            assert found_in(about_of(preset(other).override([f"label_scenes.{change}"]))) == {}
    listed = {**DATA, "label scenes": "from a list"}
    assert found_in(about_of(one, data=listed)) == {"data.label scenes": ("from a list", usual)}


def test_a_run_of_an_earlier_release_used_the_first_of_each_block():
    saved = about_of(preset("table1/simplebev-enb0/map-10"), data={**DATA, "label scenes": "evenly spread"}).to_dict()
    del saved["config"]["label_scenes"]
    found = found_in(RunInfo.from_dict(saved))
    assert found == {"data.label scenes": ("first of each block, split order", "last of each block, table order")}


def test_differences_are_reported_with_both_values():
    changes = ["optim.batch=2", "optim.lr=1e-5", "optim.optimizer=adamw", "loss.feat=5", "frame=ego"]
    config = dataclasses.replace(Config().override(changes), augment=NO_AUGMENTATION)
    found = found_in(about_of(config))
    assert found["optim.batch"] == ("2", "16") and found["optim.lr"] == ("1e-05", "0.001")
    assert found["optim.optimizer"] == ("adamw", "adam") and found["frame"] == ("ego", "cameras")
    assert found["loss.feat"][0] == "5"
    assert found["augment.resize"] == ("1, 1", "0.8, 1.2") and "augment.flip_bev" in found


def test_differences_of_teacher_data_and_upsampling_are_reported():
    teacher = {**TARGETS.to_dict()["teacher"], "name": "random:facebook/dinov2-small", "input_size": [112, 196]}
    targets = {**TARGETS.to_dict(), "teacher": teacher, "num_sweeps": 5}
    data = {**DATA, "version": "v1.0-mini", "keyframes": 323}
    found = found_in(about_of(Config(), targets=targets, data=data))
    assert found == {
        "targets.teacher.name": ("random:facebook/dinov2-small", "facebook/dinov2-small"),
        "targets.teacher.input_size": ("112x196", "224x392"),
        "targets.num_sweeps": ("5", "1"),
        "data.version": ("v1.0-mini", "v1.0-trainval"),
        "data.keyframes": ("323", "28130"),
    }
    large = preset("table2/simplebev-enb0-448x800/occfeat")
    assert found_in(about_of(large, size=(270, 480))) == {
        "upsampling": ("from 270x480 to up to 537x960 pixels", "none")
    }
    local = {**TARGETS.to_dict(), "teacher": {**TARGETS.to_dict()["teacher"], "name": "/models/dinov2-small"}}
    assert found_in(about_of(Config(), targets=local)) == {
        "targets.teacher.name": ("local folder dinov2-small, weights not compared", "facebook/dinov2-small")
    }
    none = {**TARGETS.to_dict(), "teacher": None}  # finetuning does not read features
    assert found_in(about_of(preset("table1/simplebev-enb0/map-1"), targets=none)) == {}
    assert {d.field for d in evaluation_differences({"version": "v1.0-mini", "split": "mini_val", "keyframes": 81})} == {
        "measured on: version", "measured on: split", "measured on: keyframes",
    }  # fmt: skip


def test_a_finetuning_reports_its_pretrainings_differences_and_both_survive_json():
    short = about_of(Config().override(["optim.epochs=1"]))
    info = about_of(preset("table1/simplebev-enb0/vehicles-1"), parent=short)
    assert RunInfo.from_dict(json.loads(json.dumps(info.to_dict()))).to_dict() == info.to_dict()
    assert found_in(info) == {"occfeat: optim.epochs": ("1", "50")}
    again = found_in(about_of(Config(), parent=about_of(Config())))
    assert again == {"initial weights": ("a run of occfeat", "a pretraining, or the backbone's")}

"""Configs: the paper's numbers, and values from the user. Also the optimiser and the schedule, which follow from them."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.labels import LABEL_KINDS
from occfeat_targets.cache.spec import STUDENT_SIZE
from occfeat_train.config import NO_AUGMENTATION, AugmentConfig, Config, LossConfig, NetworkConfig, OptimConfig
from occfeat_train.presets import PRESETS, finetuning, preset
from occfeat_train.training.optim import build_optimizer

# -- the paper's numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in PRESETS if name.split("/")[-1] == "occfeat" and "small" not in name])
def test_pretraining_has_the_values_of_section_4_1(name):
    config = preset(name)
    assert config.task == "occfeat"
    optim = config.optim
    assert (optim.optimizer, optim.schedule, optim.lr, optim.weight_decay) == ("adam", "constant", 1e-3, 1e-7)
    assert (optim.batch, optim.accumulation, optim.epochs) == (16, 1, 50)
    assert (config.loss.occ, config.loss.feat) == (1, 0.01)
    assert config.network.channels == 128
    assert config.network.image_size == ((448, 800) if "448x800" in name else (224, 400))


def test_the_dagger_changes_only_the_epochs_to_100():
    for network in ("simplebev-enb0", "simplebev-rn50"):
        dagger, plain = (preset(f"table1/{network}/{name}") for name in ("occfeat-100ep", "occfeat"))
        assert dagger.differences(plain) == ["optim.epochs: 100.0 != 50"]


@pytest.mark.parametrize(
    ("labels", "epochs", "lr", "batch", "accumulation"),
    [(1, 100, 1e-4, 6, 1), (10, 50, 1e-4, 6, 1), (100, 30, 3e-4, 8, 5)],
)
@pytest.mark.parametrize(
    "row",
    ["table1/simplebev-enb0", "table1/simplebev-rn50", "table1/bevformer-enb0", "table2/simplebev-enb0-448x800"],
)
def test_finetuning_has_the_values_of_section_4_1(row, labels, epochs, lr, batch, accumulation):
    for task in ("vehicles", "map") if row.startswith("table1") else ("vehicles",):
        config = preset(f"{row}/{task}-{labels}")
        assert (config.task, config.labels) == (task, labels)
        optim = config.optim
        assert (optim.epochs, optim.lr, optim.batch, optim.accumulation) == (epochs, lr, batch, accumulation)
        assert (optim.optimizer, optim.schedule, optim.weight_decay) == ("adamw", "onecycle", 1e-7)
        assert config.network == preset(f"{row}/occfeat").network


def test_other_label_fractions_use_the_recipe_of_the_next_larger_one_in_the_paper():
    assert finetuning("map", 5, NetworkConfig()).optim == preset("table1/simplebev-enb0/map-10").optim
    assert finetuning("map", 0.5, NetworkConfig()).optim == preset("table1/simplebev-enb0/map-1").optim
    assert finetuning("map", 11, NetworkConfig()).labels == 11


def test_networks_are_those_of_the_papers_rows():
    assert preset("table1/simplebev-enb0/occfeat").network.backbone == "efficientnet-b0"
    assert preset("table1/simplebev-rn50/occfeat").network.backbone == "resnet-50"
    assert preset("table2/simplebev-enb0-448x800/occfeat").network.backbone == "efficientnet-b0"
    bevformer = preset("table1/bevformer-enb0/occfeat")
    assert bevformer.differences(Config()) == ["network.lifting: bevformer != simplebev"]
    assert [name for name in PRESETS if "bevformer" in name and "100ep" in name] == []  # the paper has none


def test_table_3_removes_one_loss():
    losses = {name: preset(f"table3/simplebev/{name}").loss for name in ("occfeat", "occ-only", "feat-only")}
    assert [(loss.occ > 0, loss.feat > 0) for loss in losses.values()] == [(True, True), (True, False), (False, True)]


def test_table_3_has_bevformer_with_occupancy_only_and_with_both_losses():
    names = [name for name in PRESETS if name.startswith("table3/bevformer/")]
    assert names == ["table3/bevformer/occ-only", "table3/bevformer/occfeat"]
    for name in names:
        assert preset(name).network == preset("table1/bevformer-enb0/occfeat").network
        assert preset(name).loss == preset(name.replace("bevformer", "simplebev")).loss


def test_bevformers_channels_are_a_multiple_of_its_heads():
    with pytest.raises(ValueError, match="network.channels=6: a multiple of BEVFormer's 4 heads expected"):
        NetworkConfig(lifting="bevformer", channels=6)
    assert NetworkConfig(channels=6).channels == 6


@pytest.mark.parametrize("value", [0, 0.0001, 0.001, 0.01, 0.1, 1.0])
def test_table_4_has_the_papers_lambdas(value):
    config = preset(f"table4/lambda-{value:g}")
    assert config.loss.feat == value
    assert dataclasses.replace(config, loss=LossConfig()) == Config()


def test_the_default_grid_and_image_size_are_the_papers():
    """Z_B = 8 and 200 x 200 cells for 100 x 100 m, "a range of 50 meters". Networks of 224 x 400 need no enlarged images."""
    grid = VoxelGrid()
    assert grid.shape == (8, 200, 200)
    assert (grid.lower[1:], grid.upper[1:]) == ((-50, -50), (50, 50))
    assert all(1.2 * n <= stored for n, stored in zip(NetworkConfig().image_size, STUDENT_SIZE, strict=True))


def test_tasks_have_the_papers_classes():
    assert LABEL_KINDS["vehicles"].classes == ("vehicles",)
    assert LABEL_KINDS["map"].classes == ("road", "sidewalk", "crosswalk", "parking_area", "road_divider")


def test_values_that_the_paper_does_not_state_are_simple_bevs():
    augment = AugmentConfig()
    assert (augment.resize, augment.crop, augment.num_cameras) == ((0.8, 1.2), 0.2, 0)
    assert augment.flip_images and augment.flip_bev and augment.shuffle_cameras and augment.random_frame
    assert (Config().loss.pos_weight, Config().optim.clip, Config().network.drop_connect) == (2.13, 5, 0.2)


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_resolves_and_survives_json(name):
    config = preset(name)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.optim.num_steps(28_130) > 0


def test_an_unknown_preset_is_refused_with_the_list_of_presets():
    with pytest.raises(ValueError, match="no preset 'table9'; there are: table1/simplebev-enb0/occfeat"):
        preset("table9")


# -- values -----------------------------------------------------------------------------------------------------------


def test_a_changed_config_survives_a_round_trip():
    config = Config(
        task="map",
        network=NetworkConfig(backbone="resnet-50", weights="a/b", channels=64, image_size=(64, 112)),
        augment=NO_AUGMENTATION,
        optim=OptimConfig("adamw", "onecycle", epochs=0.5),
        loss=LossConfig(occ=0, feat=1, pos_weight=1),
        labels=12.5,
        frame="CAM_BACK",
        precision="bfloat16",
        seed=9,
    )
    again = Config.from_dict(config.to_dict())
    assert again == config
    assert isinstance(again.network.image_size, tuple)
    assert config.to_dict()["network"]["image_size"] == [64, 112]


def test_fields_of_another_release_are_refused():
    data = {**Config().to_dict(), "novel": 1}
    with pytest.raises(ValueError, match="unknown fields novel: this config was written by another release"):
        Config.from_dict(data)
    with pytest.raises(ValueError, match="unknown fields optim.novel"):
        Config.from_dict({"optim": {"novel": 1}})


def test_differences_name_each_field():
    other = Config().override(["optim.lr=0.5", "frame=ego"])
    assert Config().differences(other) == ["optim.lr: 0.001 != 0.5", "frame: auto != ego"]
    assert Config().differences(Config()) == []


@pytest.mark.parametrize(
    ("assignment", "field", "value"),
    [
        ("optim.lr=1e-4", "optim.lr", 1e-4),
        ("optim.epochs=3", "optim.epochs", 3.0),
        ("optim.batch=4", "optim.batch", 4),
        ("network.image_size=448x800", "network.image_size", [448, 800]),
        ("network.image_size=[64, 112]", "network.image_size", [64, 112]),
        ("network.weights=none", "network.weights", "none"),
        ("network.backbone=resnet-50", "network.backbone", "resnet-50"),
        ("network.lifting=lss", "network.lifting", "lss"),
        ("network.compat=simple-bev", "network.compat", "simple-bev"),
        ("augment.resize=[1, 1]", "augment.resize", [1.0, 1.0]),
        ("augment.flip_bev=False", "augment.flip_bev", False),
        ("compile=true", "compile", True),
        ("task=vehicles", "task", "vehicles"),
        (" labels = 10 ", "labels", 10.0),
    ],
)
def test_an_override_changes_only_its_field(assignment, field, value):
    changed = Config().override([assignment])
    assert changed.flat() == {**Config().flat(), field: value}
    assert type(changed.flat()[field]) is type(value)


def test_overrides_apply_in_order():
    assert Config().override(["seed=1", "optim.lr=0.1", "seed=2"]) == Config(seed=2, optim=OptimConfig(lr=0.1))
    assert Config().override([]) == Config()


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optim.lr", "--set optim.lr: key=value expected, such as --set optim.lr=1e-4"),
        ("optim.rate=1", "--set optim.rate=1: no such field; there are task, network.lifting"),
        ("rate.lr=1", "no such field"),
        ("seed.lr=1", "no such field"),
        ("optim.lr.x=1", "no such field"),
        ("optim=1", "no such field"),
        ("optim.lr=fast", "optim.lr='fast': a value of type float expected"),
        ("optim.lr=true", "optim.lr=True: a value of type float expected"),
        ("optim.batch=1.5", "optim.batch=1.5: a value of type int expected"),
        ("optim.batch=True", "optim.batch=True: a value of type int expected"),
        ("compile=1", "compile=1: a value of type bool expected"),
        ("frame=1", "frame=1: a value of type str expected"),
        ("network.image_size=224", r"network.image_size=224: a value of type tuple\[int, int\] expected"),
        ("network.image_size=1x2x3", r"network.image_size=\[1, 2, 3\]: a value of type tuple"),
        ('augment.resize=[1, "a"]', "augment.resize='a': a value of type float expected"),
        ("task=train", "task='train': one of occfeat, vehicles, map expected"),
        ("precision=[1]", r"precision=\[1\]: one of auto, float32, bfloat16 expected"),
        ("network.backbone=vit", "backbone='vit': one of efficientnet-b0, resnet-50, resnet-101 expected"),
        ("network.lifting=cvt", "lifting='cvt': one of simplebev, bevformer, lss expected"),
        ("network.compat=lss", "compat='lss': one of none, simple-bev expected"),
        ("network.channels=7", "network.channels=7: an even number of at least 2 expected"),
        ("network.channels=0", "network.channels=0: an even number"),
        ("network.image_size=225x400", "network.image_size=225x400: .* multiples of 16, the nearest is 224x400"),
        ("network.image_size=4x400", "the nearest is 16x400"),
        ("network.drop_connect=1", "network.drop_connect=1.0: at least 0 and less than 1"),
        ("augment.resize=[1.2, 0.8]", r"augment.resize=\(1.2, 0.8\): two increasing factors above 0"),
        ("augment.resize=[0, 1]", "two increasing factors above 0"),
        ("augment.crop=1", "augment.crop=1.0: at least 0 and less than 1"),
        ("augment.crop=NaN", "augment.crop=nan: at least 0"),
        ("augment.num_cameras=-1", r"augment.num_cameras=-1: at least 0 expected \(0 keeps all\)"),
        ("optim.optimizer=sgd", "optimizer='sgd': one of adam, adamw expected"),
        ("optim.schedule=cosine", "schedule='cosine': one of constant, onecycle expected"),
        ("optim.lr=0", "optim.lr=0.0: a number above 0 expected"),
        ("optim.lr=Infinity", "optim.lr=inf: a number above 0 expected"),
        ("optim.epochs=NaN", "optim.epochs=nan: a number above 0"),
        ("optim.batch=0", "optim.batch=0: a number above 0"),
        ("optim.accumulation=-1", "optim.accumulation=-1: a number above 0"),
        ("optim.clip=0", "optim.clip=0.0: a number above 0"),
        ("optim.weight_decay=-1", "optim.weight_decay=-1.0: at least 0 expected"),
        ("loss.feat=-1", "loss.occ=1.0 and loss.feat=-1.0: weights of at least 0, not both 0, expected"),
        ("loss.feat=NaN", "loss.occ=1.0 and loss.feat=nan: weights of at least 0"),
        ("loss.occ=Infinity", "loss.occ=inf and loss.feat=0.01: weights of at least 0"),
        ("loss.pos_weight=0", "loss.pos_weight=0.0: a number above 0 expected"),
        ("labels=0", "labels=0.0: percent of the training scenes, above 0 and at most 100"),
        ("labels=101", "labels=101.0: percent"),
        ("labels=NaN", "labels=nan: percent"),
    ],
)
def test_an_invalid_override_is_refused_with_the_reason(assignment, message):
    with pytest.raises(ValueError, match=message):
        Config().override([assignment])


def test_a_run_without_a_loss_is_refused():
    with pytest.raises(ValueError, match="loss.occ=0.0 and loss.feat=0.0: .* not both 0"):
        Config().override(["loss.occ=0", "loss.feat=0"])


# -- steps, optimiser, schedule ---------------------------------------------------------------------------------------


def test_steps_are_counted_in_one_stream_of_samples():
    assert OptimConfig(epochs=50, batch=16).num_steps(28_130) == 50 * 28_130 // 16
    assert OptimConfig(epochs=30, batch=8, accumulation=5).num_steps(28_130) == 30 * 28_130 // 40
    assert OptimConfig(epochs=2, batch=16).num_steps(12) == 1  # more than one epoch per step
    assert OptimConfig(epochs=1, batch=16).num_steps(3) == 1  # at least one
    assert OptimConfig(epochs=0.5, batch=2).num_steps(10) == 2
    assert OptimConfig(batch=8, accumulation=5).samples_per_step == 40


def parameter() -> nn.Parameter:
    value = nn.Parameter(torch.ones(3))
    value.grad = torch.zeros(3)
    return value


def learning_rates(config: OptimConfig, num_steps: int) -> list[float]:
    """The learning rate of each step, with the loop's order of calls."""
    optimizer, schedule = build_optimizer([parameter()], config, num_steps)
    rates = []
    for _ in range(num_steps):
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
        assert schedule.get_last_lr() == [rates[-1]]
        schedule.step()
    return rates


def test_a_constant_schedule_is_constant():
    assert learning_rates(OptimConfig(), 30) == [1e-3] * 30


def test_one_cycle_rises_for_a_twentieth_of_the_steps_and_then_falls():
    lr, steps = 3e-4, 999  # the schedule's 1000th value is not used
    rates = learning_rates(OptimConfig("adamw", "onecycle", lr=lr), steps)
    peak, last = 49, 999
    for step, rate in enumerate(rates):
        up, down = step / peak, (step - peak) / (last - peak)
        expected = lr / 25 + up * (lr - lr / 25) if step <= peak else lr + down * (lr / 250_000 - lr)
        assert rate == pytest.approx(expected, rel=1e-9), step
    assert rates[0] == pytest.approx(lr / 25)
    assert max(rates) == rates[peak] == pytest.approx(lr)
    assert rates[-1] < 1.1 * lr / (last - peak)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60))
def test_one_cycle_of_any_length_starts_low_and_peaks_once(steps):
    rates = learning_rates(OptimConfig("adamw", "onecycle", lr=1.0), steps)
    assert rates[0] == pytest.approx(1 / 25)
    top = rates.index(max(rates))
    assert rates == sorted(rates[: top + 1]) + sorted(rates[top + 1 :], reverse=True)
    assert all(0 < rate <= 1 for rate in rates)


def test_one_cycle_of_19_steps_works():
    """A twentieth of 19 + 1 is the first step. torch would divide by zero."""
    rates = learning_rates(OptimConfig("adamw", "onecycle", lr=1.0), 19)
    assert rates[:2] == pytest.approx([1 / 25, 1])


@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_the_optimiser_has_the_configs_values(name, kind):
    optimizer, _ = build_optimizer([parameter()], OptimConfig(name, weight_decay=1e-3), 10)
    assert type(optimizer) is kind
    assert optimizer.defaults["weight_decay"] == 1e-3
    assert optimizer.defaults["betas"] == (0.9, 0.999)  # torch's defaults, as in Simple-BEV
    assert optimizer.defaults["eps"] == 1e-8


def test_one_cycle_does_not_change_the_momentum():
    optimizer, schedule = build_optimizer([parameter()], OptimConfig("adamw", "onecycle"), 10)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    assert math.isclose(optimizer.param_groups[0]["eps"], 1e-8)

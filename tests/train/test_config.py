"""Configs: values from the user, overrides, and conversion."""

from __future__ import annotations

import pytest

from occfeat_train.config import NO_AUGMENTATION, Config, LossConfig, NetworkConfig, OptimConfig


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
        ("compile=1", "compile=1: one of True, False, auto expected"),
        ("frame=1", "frame=1: a value of type str expected"),
        ("network.image_size=224", r"network.image_size=224: a value of type tuple\[int, int\] expected"),
        ("network.image_size=1x2x3", r"network.image_size=\[1, 2, 3\]: a value of type tuple"),
        ('augment.resize=[1, "a"]', "augment.resize='a': a value of type float expected"),
        ("task=train", "task='train': one of occfeat, img-also, vehicles, map expected"),
        ("precision=[1]", r"precision=\[1\]: one of auto, float32, bfloat16 expected"),
        ("network.backbone=vit", "backbone='vit': one of efficientnet-b0, resnet-50, resnet-101 expected"),
        ("network.lifting=gkt", "lifting='gkt': one of simplebev, bevformer, lss, cvt expected"),
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
        ("optim.lr=0", "optim.lr=0.0: a number above 0"),
        ("optim.lr=Infinity", "optim.lr=inf: a number above 0"),
        ("optim.epochs=1e308", r"optim.epochs=1e\+308: a number above 0 and at most 1,000,000,000 expected"),
        (f"optim.batch={10**400}", "a number above 0 and at most 1,000,000,000 expected"),
        ("optim.batch=10000000", "optim.batch=10000000 and optim.accumulation=1: at most 1,000,000 samples per step"),
        (f"seed={2**63}", f"seed={2**63}: a whole number of 64 bits expected"),
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

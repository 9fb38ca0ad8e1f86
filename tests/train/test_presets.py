"""Presets: the numbers of the paper's section 4.1 and of its tables."""

from __future__ import annotations

import dataclasses
import json

import pytest

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.labels import LABEL_KINDS
from occfeat_targets.cache.spec import STUDENT_SIZE, TeacherSpec
from occfeat_targets.targets.teacher_dino import Dinov2
from occfeat_train.cache_needs import CHANNELS, bytes_per_keyframe, wrong_teacher
from occfeat_train.config import DEFAULT_TEACHER, AugmentConfig, Config, LossConfig, NetworkConfig
from occfeat_train.presets import PRESETS, finetuning, preset
from occfeat_train.tasks.build import build_task, count_parameters
from occfeat_train.training.paper import TARGETS
from tests.conftest import REPOSITORY
from tests.train.runs import pretrain, refuse, steps, succeed


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
    for row in ("table1/simplebev-enb0", "table1/simplebev-rn50", "table2/simplebev-enb0-224x400"):
        dagger, plain = (preset(f"{row}/{name}") for name in ("occfeat-100ep", "occfeat"))
        assert dagger.differences(plain) == ["optim.epochs: 100.0 != 50"]


@pytest.mark.parametrize(
    ("labels", "epochs", "lr", "batch", "accumulation"),
    [(1, 100, 1e-4, 6, 1), (10, 50, 1e-4, 6, 1), (100, 30, 3e-4, 8, 5)],
)
@pytest.mark.parametrize(
    "row",
    [
        "table1/simplebev-enb0",
        "table1/simplebev-rn50",
        "table1/bevformer-enb0",
        "table2/simplebev-enb0-224x400",
        "table2/simplebev-enb0-448x800",
    ],
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


SCALED = {
    "teacher-vitb": "teacher: facebook/dinov2-base != any",
    "teacher-vitl": "teacher: facebook/dinov2-large != any",
    "teacher-vitg": "teacher: facebook/dinov2-giant != any",
    "student-rn101": "network.backbone: resnet-101 != efficientnet-b0",
    "wide-decoder": "network.channels: 256 != 128",
}


@pytest.mark.parametrize(("name", "difference"), SCALED.items())
def test_a_scaled_preset_changes_one_field_and_the_readme_has_its_sizes(name, difference):
    config = preset(f"scale/{name}")
    assert config.differences(Config()) == [difference]
    dim = CHANNELS[DEFAULT_TEACHER if config.teacher == "any" else config.teacher]
    task, size = build_task(config, VoxelGrid(), dim), bytes_per_keyframe(config)
    readme = (REPOSITORY / "README.md").read_text()
    cells = f"{dim:,} | {size / 1e6:.1f} MB, {size * 28_130 / 1e9:.0f} GB | {count_parameters(task) / 1e6:.1f} M"
    assert f"| `scale/{name}` | {cells} |" in readme


def test_the_channels_of_teachers_are_those_of_their_architectures():
    for name, channels in CHANNELS.items():
        assert Dinov2.architectures[name]["hidden_size"] == channels


def test_presets_name_the_options_of_the_cache_that_they_need():
    assert preset("scale/teacher-vitg").build_options == ["--teacher facebook/dinov2-giant"]
    assert preset("table1/simplebev-enb0/img-also").build_options == ["--points"]
    assert preset("table2/simplebev-enb0-448x800/occfeat").build_options == ["--image-size 540x960"]
    assert Config().build_options == Config(teacher="facebook/dinov2-small").build_options == []


def test_config_show_prints_the_size_of_the_cache():
    assert bytes_per_keyframe(Config()) == TARGETS.bytes_per_keyframe
    assert bytes_per_keyframe(preset("scale/teacher-vitb")) == TARGETS.bytes_per_keyframe + 6 * 16 * 28 * 384 * 2
    shown = succeed("config", "show", "scale/teacher-vitg")
    assert "# needs a cache built with --image-size 270x480 or more, and --teacher facebook/dinov2-giant" in shown
    assert "# about 10.6 MB per keyframe of nuScenes, 298 GB for its train split" in shown
    assert "a cache built with --teacher facebook/dinov2-giant" in succeed("config", "list")
    assert "per keyframe" not in succeed("config", "show", "scale/teacher-vitg", "--set", "teacher=my/own")


@pytest.mark.parametrize(
    ("name", "dim", "fits"),
    [
        ("facebook/dinov2-base", 768, True),
        ("random:facebook/dinov2-base", 768, True),
        ("/models/my-dinov2-base", 768, True),
        ("facebook/dinov2-small", 384, False),
        ("/models/dinov2-small", 384, False),
        ("facebook/dinov3-vitb16-pretrain-lvd1689m", 768, False),
    ],
)
def test_a_cache_of_another_teacher_than_the_config_names_is_recognised(name, dim, fits):
    teacher = TeacherSpec(name, "", (224, 392), 14, dim)
    reason = wrong_teacher("facebook/dinov2-base", teacher)
    assert (reason is None) == fits
    assert fits or f"those of {name} with {dim} channels, the run wants teacher=facebook/dinov2-base with 768" in str(
        reason
    )
    assert wrong_teacher("any", teacher) is None
    assert (wrong_teacher("my/own", teacher) is None) == name.startswith("/")


def test_a_preset_of_a_larger_teacher_refuses_a_cache_of_another(cache, tmp_path):
    wanted = ["--preset", "scale/teacher-vitb"]
    message = refuse(*pretrain(cache, tmp_path / "run", *wanted), out=tmp_path / "run")
    assert "train.zarr: its features are those of made up with 6 channels" in message
    assert "build a cache with --teacher facebook/dinov2-base" in message and "--set teacher=any" in message
    assert "finished" in succeed(*pretrain(cache, tmp_path / "run", *wanted, "--set", "teacher=any", *steps(1)))
    assert "finished" in succeed(*pretrain(cache, tmp_path / "occ", *wanted, "--set", "loss.feat=0", *steps(1)))


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


def test_a_loss_over_observed_voxels_needs_rays():
    config = preset("small/occfeat").override(["loss.occ_on=observed"])
    assert config.build_options == ["--rays"]
    assert bytes_per_keyframe(config) > bytes_per_keyframe(preset("small/occfeat"))

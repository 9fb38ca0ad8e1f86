import dataclasses

import pytest

from occfeat_targets.cache.corruption import CorruptionSpec
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.labels import MAP_CLASSES
from occfeat_targets.cache.spec import CAMERAS, LARGEST_RESIZE, TargetSpec, TeacherSpec, largest_network

TEACHER = TeacherSpec("facebook/dinov2-small", "abc", (224, 392), 14, 384)


def test_a_spec_survives_json_with_its_fingerprint():
    spec = TargetSpec(teacher=TEACHER, frames=("ego", *CAMERAS), feature_dtype="int8")
    again = TargetSpec.from_dict(spec.to_dict())
    assert again == spec
    assert again.fingerprint == spec.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"source": "other"},
        {"grid": VoxelGrid((4, 200, 200))},
        {"frames": ("CAM_FRONT",)},
        {"image_size": (448, 800)},
        {"teacher": None},
        {"teacher": dataclasses.replace(TEACHER, digest="abd")},
        {"teacher": dataclasses.replace(TEACHER, layer="pre-norm")},
        {"feature_dtype": "int8"},
        {"num_sweeps": 2},
        {"ego_box": 2.0},
        {"labels": ("map",)},
        {"dividers": "road+lane"},
        {"compat": "simple-bev"},
        {"rays": True},
        {"dynamic": "carve"},
        {"dynamic": "boxes"},
        {"corruption": CorruptionSpec("fog", 2)},
    ],
)
def test_every_option_that_decides_bytes_changes_the_fingerprint(change):
    spec = TargetSpec(teacher=TEACHER, num_sweeps=5)
    changed = dataclasses.replace(spec, **change)
    assert changed.fingerprint != spec.fingerprint
    (difference,) = spec.differences(changed)
    assert difference.startswith(next(iter(change)))


def test_caches_of_earlier_releases_keep_their_fingerprint():
    data = TargetSpec(teacher=TEACHER).to_dict()
    del data["rays"], data["dynamic"], data["instances"], data["corruption"]
    assert TargetSpec.from_dict(data) == TargetSpec(teacher=TEACHER)
    assert TargetSpec(teacher=TEACHER).fingerprint == "aa387214fe3b65e4"
    assert TargetSpec(teacher=TEACHER, num_sweeps=10).fingerprint == "8d2e40f12289df1d"


def test_the_fingerprint_depends_on_the_teachers_digest_and_not_on_its_name():
    spec = TargetSpec(teacher=TEACHER)
    moved = dataclasses.replace(spec, teacher=dataclasses.replace(TEACHER, name="/models/d2"))
    other = dataclasses.replace(spec, teacher=dataclasses.replace(TEACHER, name="/models/d2", digest="abd"))
    assert moved.fingerprint == spec.fingerprint
    assert moved == spec
    (difference,) = spec.differences(other)
    assert difference.startswith("teacher:")
    for part in ("abc", "abd", "facebook/dinov2-small", "/models/d2"):
        assert part in difference
    assert "384" not in difference


def test_a_cache_of_the_first_format_is_refused_with_the_remedy():
    data = TargetSpec(teacher=TEACHER).to_dict()
    data["teacher"]["revision"] = data["teacher"].pop("digest")
    with pytest.raises(ValueError, match="format version 1.*rebuild the cache"):
        TargetSpec.from_dict({**data, "format_version": 1})


def test_feature_maps_of_the_paper_take_2064384_bytes():
    features = next(a for a in TargetSpec(teacher=TEACHER).arrays() if a.name == "features")
    assert features.shape == (6, 16, 28, 384)
    assert features.nbytes == 2_064_384


def test_teacher_input_that_is_not_a_patch_multiple_is_refused_with_the_nearest_size():
    with pytest.raises(ValueError, match="--feature-size 224x392"):
        TeacherSpec("x", "r", (224, 400), 14, 384)


@pytest.mark.parametrize(
    "bad",
    [
        {"frames": ()},
        {"frames": ("lidar",)},
        {"frames": ("ego", "ego")},
        {"feature_dtype": "float32"},
        {"num_sweeps": 0},
        {"num_sweeps": 5, "dynamic": "drop"},
        {"dynamic": "carve"},
        {"labels": ("boxes",)},
        {"dividers": "lane"},
        {"compat": "lss"},
        {"image_size": (4, 4)},
        {"format_version": 1},
    ],
)
def test_a_spec_that_cannot_be_built_is_refused(bad):
    with pytest.raises(ValueError, match="expected|release"):
        TargetSpec(**bad)


def test_map_label_channels_are_the_papers_five():
    assert MAP_CLASSES == ("road", "sidewalk", "crosswalk", "parking_area", "road_divider")


@pytest.mark.parametrize(
    ("cached", "trained", "evaluated"),
    [
        ((270, 480), (224, 400), (256, 480)),
        ((540, 960), (448, 800), (528, 960)),
        ((80, 140), (64, 112), (80, 128)),
        ((18, 480), (0, 400), (16, 480)),
    ],
)
def test_a_spec_states_the_largest_network_that_needs_no_enlarged_images(cached, trained, evaluated):
    assert largest_network(cached, LARGEST_RESIZE) == trained
    assert largest_network(cached, 1) == evaluated
    line = next(line for line in TargetSpec(image_size=cached).describe() if line.startswith("images"))
    assert "train at up to {}x{} (resized by up to 1.2)".format(*trained) in line
    assert line.endswith("evaluated at up to {}x{}".format(*evaluated))


def test_a_spec_states_the_size_of_the_cells_and_warns_of_a_grid_in_another_order():
    usual, other = TargetSpec().describe(), TargetSpec(grid=VoxelGrid((200, 200, 8))).describe()
    assert usual[1] == "cells 1.25 m high, 0.5 m long (forward), 0.5 m wide (right)"
    assert other[1] == "cells 0.05 m high, 0.5 m long (forward), 12.5 m wide (right)"
    assert "warning" not in "\n".join(usual)
    assert other[2].startswith("warning: cells are 0.5 m long and 12.5 m wide; the order is up, forward, right")


def test_a_spec_without_teacher_or_labels_has_no_such_arrays():
    names = [a.name for a in TargetSpec(labels=()).arrays()]
    expected = ["is_valid", "camera_valid", "image_area", "intrinsics", "cam_from_ego", "grid_from_ego", "images"]
    assert names == [*expected, "occupancy"]

"""Voxels of a keyframe: the trainer's target features, colours, labels of cells."""

from __future__ import annotations

import numpy as np
import pytest

from occfeat_targets.cache.geometry import GRID_FROM_CAMERA_AXES, inverse_rigid
from occfeat_targets.probe.inputs import INPUTS, expand, inputs_of
from occfeat_targets.probe.voxels import read_voxels
from occfeat_train.ops.mean_over_views import sample_voxel_features_numpy
from tests.conftest import SMALL_GRID, small_spec
from tests.targets.probe_caches import FRONT, write_cache
from tests.targets.sheets import YAWS, cam_from_ego

ALL = np.ones(6, np.bool_)


def read(reader, keyframe=0, frame=0, most=10**6, seed=0):
    return read_voxels(reader, keyframe, frame, most, np.random.default_rng(seed))


def jittered_poses(seen_by):
    """Cameras off the ego's origin that look a little downwards, so that no voxel lies on the border of an image."""
    rng = np.random.default_rng(5)
    poses = []
    for yaw in YAWS:
        pose = cam_from_ego(yaw + rng.normal(0, 0.05))
        pose[:3, 3] = rng.normal(0, 0.3, 3)
        poses.append(pose)
    return np.array(poses) * seen_by[:, None, None]


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("frame", ["ego", "CAM_FRONT"])
@pytest.mark.parametrize("cameras", ["all", "one masked", "areas"])
def test_features_and_colours_are_those_that_the_trainer_samples(tmp_path, dtype, frame, cameras):
    seen_by = ALL if cameras != "one masked" else np.arange(6) != 2
    poses = jittered_poses(seen_by)
    grids = np.stack([np.eye(4), GRID_FROM_CAMERA_AXES @ cam_from_ego(0)])
    reader = write_cache(
        tmp_path / "train.zarr", ["a"] * 2, spec=small_spec(feature_dtype=dtype, frames=("ego", "CAM_FRONT")), seen_by=seen_by,
        cam_from_ego=poses, grid_from_ego=grids, image_area=(2, 5, 13, 20) if cameras == "areas" else (0, 0, 16, 24),
    )  # fmt: skip
    index = reader.cache.spec.frames.index(frame)
    found = read(reader, 1, index)
    arrays = {array.name: reader.read(array.name, 1) for array in reader.cache.spec.arrays()}
    volume = SMALL_GRID.unpack_volume(arrays["occupancy"][index])
    centers = SMALL_GRID.voxel_centers()[volume]
    geometry = (
        arrays["cam_from_ego"] @ inverse_rigid(arrays["grid_from_ego"][index]),
        arrays["intrinsics"],
        (16, 24),
        centers,
    )
    area = arrays["image_area"]
    features, num_views = sample_voxel_features_numpy(
        arrays["features"], arrays.get("feature_scale"), *geometry, area=area, dtype="float32"
    )
    colors, _ = sample_voxel_features_numpy(
        arrays["images"].astype(np.float32), None, *geometry, area=area, dtype="float32"
    )
    seen = num_views > 0
    assert 20 < seen.sum() < len(seen) and (num_views > 1).any() == (cameras != "areas")
    np.testing.assert_array_equal(found.centers, centers[seen])
    np.testing.assert_allclose(found.features, features[seen], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(found.colors, colors[seen] / 255, rtol=1e-4, atol=1e-5)


def test_labels_are_those_of_the_voxels_cell(tmp_path):
    reader = write_cache(tmp_path / "train.zarr", ["a"], **{"labels/vehicles_valid": 0b01010111})
    found = read(reader)
    vehicles, valid = (
        SMALL_GRID.unpack_map(reader.read(f"labels/{name}", 0))[0] for name in ("vehicles", "vehicles_valid")
    )
    maps = SMALL_GRID.unpack_map(reader.read("labels/map", 0))[0]
    up, forward, right = SMALL_GRID.cell_size
    for i, (x, y, _) in enumerate(found.centers):
        row, column = int((y - SMALL_GRID.lower[1]) // forward), int((x - SMALL_GRID.lower[2]) // right)
        assert found.labels["vehicles"][i] == [vehicles[row, column]]
        assert found.is_valid["vehicles"][i] == valid[row, column]
        np.testing.assert_array_equal(found.labels["map"][i], maps[:, row, column])
    assert found.is_valid["map"].all() and set(found.is_valid["vehicles"]) == {False, True}
    assert up == 1  # levels share the labels of a cell
    assert len(np.unique(found.centers[:, :2], axis=0)) < len(found)


def test_at_most_the_given_number_is_drawn_by_the_seed(tmp_path):
    reader = write_cache(tmp_path / "train.zarr", ["a"])
    whole, some, again, other = read(reader), read(reader, most=9), read(reader, most=9), read(reader, most=9, seed=1)
    assert len(some) == 9 < len(whole)
    np.testing.assert_array_equal(some.centers, again.centers)
    assert not np.array_equal(some.centers, other.centers)
    rows = [int(np.flatnonzero((whole.centers == center).all(1))[0]) for center in some.centers]
    for name in ("features", "colors"):
        np.testing.assert_array_equal(getattr(some, name), getattr(whole, name)[rows])
    np.testing.assert_array_equal(some.labels["map"], whole.labels["map"][rows])


def test_features_that_are_not_finite_are_refused(tmp_path):
    features = np.ones((6, 2, 3, 8), np.float16)
    features[FRONT, 1, 1, 3] = np.inf
    reader = write_cache(tmp_path / "train.zarr", ["a"], features=features)
    with pytest.raises(ValueError, match=r"keyframe 0 \(sample train-0\) of .* features that are not finite"):
        read(reader)


def test_colour_and_place_are_expanded_to_second_order(tmp_path):
    np.testing.assert_array_equal(expand(np.array([[2.0, 3.0, 5.0]])), [[2, 3, 5, 4, 6, 10, 9, 15, 25]])
    voxels = read(write_cache(tmp_path / "train.zarr", ["a"]))
    inputs = inputs_of(voxels)
    assert {name: values.shape[1] for name, values in inputs.items()} == dict(zip(INPUTS, (8, 9, 5, 14), strict=True))
    x, y, z = voxels.centers.T
    place = [z, np.hypot(x, y), z * z, z * np.hypot(x, y), x * x + y * y]
    np.testing.assert_allclose(inputs["height and distance"], np.stack(place, 1), rtol=1e-5)

"""A batch on its way to the network: bits unpacked as the grid packs them, views as drawn, targets as cached."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from occfeat_targets.cache.geometry import GRID_FROM_CAMERA_AXES, inverse_rigid, rigid
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.data.augment import resample, transform_intrinsics
from occfeat_train.data.batch import Batch, unpack_bits
from occfeat_train.ops.mean_over_views import voxel_centers
from occfeat_train.ops.mean_over_views_numba import sample_voxel_features_numpy
from occfeat_train.tasks.heads import voxel_rows

GRID = VoxelGrid((4, 12, 10), (-2, -12, -9), (2, 10, 11))  # off centre; neither volume nor rows fill whole bytes of 8
CAMERAS = 3


def calibration(rng: np.random.Generator, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Level cameras 1 m above the grid's origin, 120 degrees apart with some jitter, 24 x 40 pixels."""
    cameras = np.empty((samples, CAMERAS, 4, 4))
    for b, c in np.ndindex(samples, CAMERAS):
        angle = (2 * np.pi * c / CAMERAS + rng.uniform(-0.3, 0.3)) / 2
        turned = rigid((np.cos(angle), 0, np.sin(angle), 0), rng.normal(0, 0.3, 3))
        cameras[b, c] = turned @ inverse_rigid(GRID_FROM_CAMERA_AXES)
    pinholes = np.tile([[18.0, 0, 20], [0, 18, 12], [0, 0, 1]], (samples, CAMERAS, 1, 1))
    pinholes[..., :2, :] += rng.uniform(-1, 1, (samples, CAMERAS, 2, 3)) * [[1, 0, 1], [0, 1, 1]]
    return cameras, pinholes


def make_batch(
    samples: int = 2,
    *,
    seed: int = 0,
    grid: VoxelGrid = GRID,
    size: tuple[int, int] = (32, 48),
    share: float = 0.2,
    feature_dim: int = 6,
    classes: int = 1,
    dtype: str = "float16",
    augmented: bool = True,
) -> Batch:
    """Random contents and, unless `augmented` is false, random draws for an input of `size`."""
    rng = np.random.default_rng(seed)
    cam_from_grid, intrinsics = calibration(rng, samples)
    features = rng.standard_normal((samples, CAMERAS, 3, 5, feature_dim))
    volumes = rng.random((samples, *grid.shape)) < share
    labels = rng.random((samples, classes, *grid.map_shape)) < 0.4
    valid = rng.random((samples, 1, *grid.map_shape)) < 0.8
    per_camera = (samples, CAMERAS, 2)
    values: dict[str, np.ndarray] = {
        "images": rng.integers(0, 256, (samples, CAMERAS, 24, 40, 3), dtype=np.uint8),
        "intrinsics": intrinsics,
        "cam_from_grid": cam_from_grid,
        "occupancy": grid.pack_volume(volumes),
        "features": (features * 30).astype(np.int8) if dtype == "int8" else features.astype(dtype),
        "labels": grid.pack_map(labels),
        "valid": grid.pack_map(valid),
        "resized": np.broadcast_to(size, per_camera).astype(np.int64),
        "crop": np.zeros(per_camera, np.int64),
        "mirror": np.zeros(per_camera[:2], np.bool_),
        "cameras": np.tile(np.arange(CAMERAS), (samples, 1)),
        "bev_flip": np.zeros((samples, 2), np.bool_),
    }
    if dtype == "int8":
        values["feature_scale"] = rng.uniform(0.01, 0.1, features.shape[:-1]).astype(np.float16)
    if augmented:
        values["resized"] = (size * rng.uniform(0.8, 1.2, (samples, CAMERAS, 1))).astype(np.int64)
        values["crop"] = rng.integers(-6, 7, per_camera)
        values["mirror"] = rng.random(per_camera[:2]) < 0.5
        values["cameras"] = np.stack([rng.permutation(CAMERAS) for _ in range(samples)])
        values["bev_flip"] = rng.random((samples, 2)) < 0.5
    tensors: dict[str, Any] = {name: torch.from_numpy(value) for name, value in values.items()}
    return Batch(tokens=tuple(f"token{i}" for i in range(samples)), grid=grid, **tensors)


# -- bits and cells ---------------------------------------------------------------------------------------------------


def test_the_lowest_bit_comes_first():
    bits = unpack_bits(torch.tensor([[0b00000001, 0b10000010]], dtype=torch.uint8))
    assert torch.nonzero(bits[0]).flatten().tolist() == [0, 9, 15]
    assert bits.dtype == torch.bool


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 255), min_size=1, max_size=30))
def test_bits_unpack_as_numpys(values):
    packed = np.array(values, np.uint8)
    expected = np.unpackbits(packed, bitorder="little").astype(bool)
    np.testing.assert_array_equal(unpack_bits(torch.from_numpy(packed)).numpy(), expected)


@pytest.mark.parametrize("grid", [GRID, VoxelGrid((3, 5, 7), (0, 0, 0), (1, 1, 1)), VoxelGrid()])
def test_voxel_centers_are_the_grids(grid):
    flat = np.random.default_rng(0).integers(0, grid.num_voxels, 500)
    centers = voxel_centers(grid, torch.from_numpy(flat))
    assert centers.dtype == torch.float32
    np.testing.assert_array_equal(centers.numpy(), grid.centers_of(flat))


@pytest.mark.parametrize("shape", [(4, 12, 10), (3, 5, 7)])
def test_occupancy_unpacks_as_the_grid_unpacks_it(shape):
    grid = VoxelGrid(shape)
    batch = make_batch(3, grid=grid)
    np.testing.assert_array_equal(batch.occupied().numpy(), grid.unpack_volume(batch.occupancy.numpy()))


@pytest.mark.parametrize("shape", [(4, 12, 10), (3, 5, 16)])
def test_map_labels_unpack_as_the_grid_unpacks_them(shape):
    grid = VoxelGrid(shape)
    batch = make_batch(3, grid=grid, classes=5)
    labels, valid = batch.map_labels()
    np.testing.assert_array_equal(labels.numpy(), grid.unpack_map(batch.labels.numpy()))
    np.testing.assert_array_equal(valid.numpy(), grid.unpack_map(batch.valid.numpy()))


def test_without_a_mask_every_cell_is_valid():
    _, valid = dataclasses.replace(make_batch(2, classes=5), valid=None).map_labels()
    assert valid.shape == (2, 1, 12, 10)
    assert valid.all()


# -- views ------------------------------------------------------------------------------------------------------------


def test_views_are_the_drawn_cameras_in_the_drawn_order():
    batch = dataclasses.replace(make_batch(2, augmented=False), cameras=torch.tensor([[2, 0], [1, 2]]))
    views = batch.views((32, 48))
    assert views.images.shape == (2, 2, 3, 32, 48)
    for b, cameras in enumerate([[2, 0], [1, 2]]):
        alone = make_batch(2, augmented=False).views((32, 48))
        assert torch.equal(views.images[b], alone.images[b, cameras])
        assert torch.equal(views.intrinsics[b], alone.intrinsics[b, cameras])
        assert torch.equal(views.cam_from_grid[b], batch.cam_from_grid[b, cameras])


def test_every_cameras_own_draw_moves_with_it():
    batch, size = make_batch(3), (32, 48)
    views = batch.views(size)
    for b, row in enumerate(batch.cameras.tolist()):
        for position, camera in enumerate(row):
            draws = [t[b : b + 1, camera : camera + 1] for t in (batch.resized, batch.crop, batch.mirror)]
            image = resample(batch.images[b : b + 1, camera : camera + 1], *draws, size)
            pinhole = transform_intrinsics(batch.intrinsics[b : b + 1, camera : camera + 1], (24, 40), *draws, size)
            torch.testing.assert_close(views.images[b, position], image[0, 0], atol=1e-5, rtol=0)
            assert torch.equal(views.intrinsics[b, position], pinhole[0, 0])


# -- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_targets_are_sampled_from_the_cached_images_sample_by_sample(dtype):
    batch = make_batch(3, dtype=dtype)
    voxels = voxel_rows(batch.occupied())
    target, views = batch.voxel_targets(voxels)
    assert 0 < (views > 0).sum() < len(voxels)  # some are seen, some are not
    for b in range(3):
        mine = (voxels // GRID.num_voxels == b).numpy()
        expected, expected_views = sample_voxel_features_numpy(
            batch.features[b].numpy(),
            None if batch.feature_scale is None else batch.feature_scale[b].numpy(),
            batch.cam_from_grid[b].numpy(),
            batch.intrinsics[b].numpy(),
            (24, 40),
            GRID.centers_of(np.flatnonzero(GRID.unpack_volume(batch.occupancy[b].numpy()))),
        )
        np.testing.assert_array_equal(target[mine].numpy(), expected)
        np.testing.assert_array_equal(views[mine].numpy(), expected_views)


def test_targets_know_nothing_of_the_augmentation():
    plain, augmented = make_batch(augmented=False), make_batch()
    augmented = dataclasses.replace(augmented, cameras=augmented.cameras[:, :1])
    assert not torch.equal(plain.resized, augmented.resized)
    voxels = voxel_rows(plain.occupied())
    for ours, other in zip(plain.voxel_targets(voxels), augmented.voxel_targets(voxels), strict=True):
        assert torch.equal(ours, other)


# -- travelling -------------------------------------------------------------------------------------------------------


def test_to_moves_every_tensor_and_nothing_else():
    batch = dataclasses.replace(make_batch(2), valid=None)
    moved = batch.to(torch.device("meta"))
    for field in dataclasses.fields(Batch):
        before, after = getattr(batch, field.name), getattr(moved, field.name)
        if isinstance(before, torch.Tensor):
            assert (after.device.type, after.shape, after.dtype) == ("meta", before.shape, before.dtype)
        else:
            assert after == before
    assert len(moved) == 2


def test_nbytes_counts_what_travels():
    batch = make_batch(2)
    without = dataclasses.replace(batch, images=torch.empty(0, dtype=torch.uint8))
    assert batch.nbytes - without.nbytes == 2 * CAMERAS * 24 * 40 * 3

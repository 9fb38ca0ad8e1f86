"""Batch: unpacking of bits, augmented views, and target features."""

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
from occfeat_train.config import Config
from occfeat_train.data.augment import resample, transform_intrinsics
from occfeat_train.data.batch import Batch, Sample, collate, unpack_bits
from occfeat_train.ops.mean_over_views import sample_voxel_features_numpy
from occfeat_train.tasks.pretraining import Pretraining

GRID = VoxelGrid((4, 12, 10), (-2, -12, -9), (2, 10, 11))  # not centred; rows and map channels are not whole bytes
CAMERAS = 3


def calibration(rng: np.random.Generator, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """cam_from_grid and intrinsics of level cameras 1 m above the grid's origin, about 120 degrees apart, of 24 x 40 pixels."""
    cameras = np.empty((samples, CAMERAS, 4, 4))
    for b, c in np.ndindex(samples, CAMERAS):
        angle = (2 * np.pi * c / CAMERAS + rng.uniform(-0.3, 0.3)) / 2
        turned = rigid((np.cos(angle), 0, np.sin(angle), 0), rng.normal(0, 0.3, 3))
        cameras[b, c] = turned @ inverse_rigid(GRID_FROM_CAMERA_AXES)
    pinholes = np.tile([[18.0, 0, 20], [0, 18, 12], [0, 0, 1]], (samples, CAMERAS, 1, 1))
    pinholes[..., :2, :] += rng.uniform(-1, 1, (samples, CAMERAS, 2, 3)) * [[1, 0, 1], [0, 1, 1]]
    return cameras, pinholes


def make_samples(
    samples: int = 2,
    *,
    seed: int = 0,
    grid: VoxelGrid = GRID,
    share: float = 0.2,
    feature_dim: int = 6,
    classes: int = 1,
    dtype: str = "float16",
) -> list[Sample]:
    """Samples with random contents: occupancy, features, labels and their validity."""
    rng = np.random.default_rng(seed)
    cam_from_grid, intrinsics = calibration(rng, samples)
    features = rng.standard_normal((samples, CAMERAS, 3, 5, feature_dim))
    arrays = {
        "occupancy": grid.pack_volume(rng.random((samples, *grid.shape)) < share),
        "features": (features * 30).astype(np.int8) if dtype == "int8" else features.astype(dtype),
        "labels": grid.pack_map(rng.random((samples, classes, *grid.map_shape)) < 0.4),
        "valid": grid.pack_map(rng.random((samples, *grid.map_shape)) < 0.8),
    }
    if dtype == "int8":
        arrays["feature_scale"] = rng.uniform(0.01, 0.1, features.shape[:-1]).astype(np.float16)
    images = rng.integers(0, 256, (samples, CAMERAS, 24, 40, 3), dtype=np.uint8)
    return [
        Sample(i, grid, (24, 40), images[i], intrinsics[i], cam_from_grid[i], {k: a[i] for k, a in arrays.items()}, rng)
        for i in range(samples)
    ]


def make_batch(samples: int = 2, *, size: tuple[int, int] = (32, 48), augmented: bool = True, **options: Any) -> Batch:
    """A batch of `make_samples` with the arrays of every task and, if `augmented`, random augmentation for images of `size`."""
    read = make_samples(samples, **options)
    targets = [
        {
            **Pretraining.targets(sample, Config()),
            "labels": sample.arrays["labels"],
            "valid": sample.arrays["valid"][None],
        }
        for sample in read
    ]
    per_camera = (samples, CAMERAS, 2)
    values: dict[str, np.ndarray] = {
        "images": np.stack([sample.images for sample in read]),
        "intrinsics": np.stack([sample.intrinsics for sample in read]),
        "cam_from_grid": np.stack([sample.cam_from_grid for sample in read]),
        "resized": np.broadcast_to(size, per_camera).astype(np.int64),
        "crop": np.zeros(per_camera, np.int64),
        "mirror": np.zeros(per_camera[:2], np.bool_),
        "cameras": np.tile(np.arange(CAMERAS), (samples, 1)),
        "bev_flip": np.zeros((samples, 2), np.bool_),
    }
    if augmented:
        rng = np.random.default_rng((options.get("seed", 0), 1))
        values["resized"] = (size * rng.uniform(0.8, 1.2, (samples, CAMERAS, 1))).astype(np.int64)
        values["crop"] = rng.integers(-6, 7, per_camera)
        values["mirror"] = rng.random(per_camera[:2]) < 0.5
        values["cameras"] = np.stack([rng.permutation(CAMERAS) for _ in range(samples)])
        values["bev_flip"] = rng.random((samples, 2)) < 0.5
    tensors: dict[str, Any] = {name: torch.from_numpy(value) for name, value in values.items()}
    tokens = tuple(f"token{i}" for i in range(samples))
    return Batch(tokens=tokens, grid=read[0].grid, arrays=collate(targets, Pretraining.ragged), **tensors)


# -- bits -------------------------------------------------------------------------------------------------------------


def test_the_lowest_bit_comes_first():
    bits = unpack_bits(torch.tensor([[0b00000001, 0b10000010]], dtype=torch.uint8))
    assert torch.nonzero(bits[0]).flatten().tolist() == [0, 9, 15]
    assert bits.dtype == torch.bool


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 255), min_size=1, max_size=30))
def test_bits_unpack_as_with_numpy(values):
    packed = np.array(values, np.uint8)
    expected = np.unpackbits(packed, bitorder="little").astype(bool)
    np.testing.assert_array_equal(unpack_bits(torch.from_numpy(packed)).numpy(), expected)


@pytest.mark.parametrize("shape", [(4, 12, 10), (3, 5, 7)])
def test_volumes_unpack_as_with_the_grid(shape):
    grid = VoxelGrid(shape)
    batch = make_batch(3, grid=grid)
    expected = grid.unpack_volume(batch.arrays["occupancy"].numpy())
    np.testing.assert_array_equal(batch.volume("occupancy").numpy(), expected)


@pytest.mark.parametrize("shape", [(4, 12, 10), (3, 5, 16)])
def test_maps_unpack_as_with_the_grid(shape):
    grid = VoxelGrid(shape)
    batch = make_batch(3, grid=grid, classes=5)
    for name in ("labels", "valid"):
        np.testing.assert_array_equal(batch.maps(name).numpy(), grid.unpack_map(batch.arrays[name].numpy()))


# -- views ------------------------------------------------------------------------------------------------------------


def test_views_are_the_chosen_cameras_in_the_chosen_order():
    batch = dataclasses.replace(make_batch(2, augmented=False), cameras=torch.tensor([[2, 0], [1, 2]]))
    views = batch.views((32, 48))
    assert views.images.shape == (2, 2, 3, 32, 48)
    for b, cameras in enumerate([[2, 0], [1, 2]]):
        alone = make_batch(2, augmented=False).views((32, 48))
        assert torch.equal(views.images[b], alone.images[b, cameras])
        assert torch.equal(views.intrinsics[b], alone.intrinsics[b, cameras])
        assert torch.equal(views.cam_from_grid[b], batch.cam_from_grid[b, cameras])


def test_augmentation_parameters_follow_their_camera():
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
def test_targets_are_features_of_occupied_voxels_that_a_camera_sees(dtype):
    batch = make_batch(3, dtype=dtype)
    voxels, features = batch.arrays["voxels"].numpy(), batch.arrays["features"].numpy()
    occupied = batch.volume("occupancy")
    assert 0 < len(voxels) < occupied.sum()  # some are visible, some are not
    for b, sample in enumerate(make_samples(3, dtype=dtype)):
        all_of_it = np.flatnonzero(occupied[b].numpy())
        expected, num_views = sample_voxel_features_numpy(
            sample.arrays["features"],
            sample.arrays.get("feature_scale"),
            sample.cam_from_grid,
            sample.intrinsics,
            (24, 40),
            GRID.voxel_centers().reshape(-1, 3)[all_of_it],
        )
        mine = voxels // GRID.num_voxels == b
        np.testing.assert_array_equal(voxels[mine] - b * GRID.num_voxels, all_of_it[num_views > 0])
        np.testing.assert_array_equal(features[mine], expected[num_views > 0])


def test_ragged_arrays_are_concatenated_and_others_stacked():
    targets = [{"a": np.zeros((n, 2)), "b": np.zeros(2)} for n in (3, 0, 1)]
    arrays = collate(targets, ["a"])
    assert {name: tuple(array.shape) for name, array in arrays.items()} == {"a": (4, 2), "b": (3, 2)}


# -- transfer ---------------------------------------------------------------------------------------------------------


def test_to_moves_every_tensor_and_nothing_else():
    batch = make_batch(2)
    moved = batch.to(torch.device("meta"))
    for field in dataclasses.fields(Batch):
        before, after = getattr(batch, field.name), getattr(moved, field.name)
        if isinstance(before, torch.Tensor):
            assert (after.device.type, after.shape, after.dtype) == ("meta", before.shape, before.dtype)
        elif field.name != "arrays":
            assert after == before
    assert moved.arrays.keys() == batch.arrays.keys()
    for name, array in batch.arrays.items():
        assert moved.arrays[name].device.type == "meta" and moved.arrays[name].shape == array.shape
    assert len(moved) == 2


def test_nbytes_is_the_size_of_all_tensors():
    batch = make_batch(2)
    without = dataclasses.replace(batch, images=batch.images[:, :, :0])
    assert batch.nbytes - without.nbytes == 2 * CAMERAS * 24 * 40 * 3
    occupancy = {name: array for name, array in batch.arrays.items() if name != "occupancy"}
    assert batch.nbytes - dataclasses.replace(batch, arrays=occupancy).nbytes == 2 * GRID.packed_bytes

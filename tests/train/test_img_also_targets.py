"""Img-ALSO: queries of a keyframe as targets of a batch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from occfeat_targets.cache.geometry import rigid, transform
from occfeat_targets.cache.reader import CacheReader
from occfeat_train.config import NO_AUGMENTATION, PRETEXTS, READS_POINTS, Config
from occfeat_train.data.batch import collate
from occfeat_train.data.dataset import KeyframeDataset
from occfeat_train.data.queries import Queries, decimate, draw_queries
from occfeat_train.tasks.img_also import ImgALSO
from tests.conftest import small_spec
from tests.train.runs import write_cache
from tests.train.test_img_also import ALSO, GRID, SENSOR, also_sample, drawn_queries


def test_returns_are_decimated_moved_to_the_grid_and_scaled():
    pose, sample = rigid((1, 0, 0, 0.5), (0.3, -0.2, 0.1)), also_sample(2, 300)
    points = sample.arrays["points"][:300]
    points[40:50, :3] = points[60:70, :3]
    kept = points[decimate(points[:, :3].astype(np.float64))]
    assert len(kept) == 290
    arrays = {**sample.arrays, "grid_from_ego": pose.astype(np.float32)}
    moved = ImgALSO.targets(dataclasses.replace(sample, arrays=arrays), ALSO)
    np.testing.assert_allclose(moved["returns"][:, :3], transform(pose, kept[:, :3].astype(np.float64)), atol=1e-5)
    np.testing.assert_allclose(moved["returns"][:, 3], kept[:, 3] / 255, atol=1e-6)
    np.testing.assert_allclose(moved["sensor"], transform(pose, SENSOR[None].astype(np.float64))[0], atol=1e-6)
    assert moved["sample"].tolist() == [2] * len(kept)
    assert {name: array.dtype.name for name, array in moved.items()} == {
        "returns": "float32", "sample": "int32", "sensor": "float32", "seed": "int64",
    }  # fmt: skip


def test_queries_of_a_moved_grid_are_the_moved_queries():
    """The device draws in the grid's frame, whose axes and origin change with augmentation."""
    pose = rigid((1, 0, 0, 0.5), (0.3, -0.2, 0.1))

    def drawn(pose: np.ndarray) -> Queries:
        targets = ImgALSO.targets(also_sample(0, 300, pose=pose), ALSO)
        return draw_queries(**collate([targets], ImgALSO.ragged), number=600)

    plain, moved = drawn(np.eye(4)), drawn(pose)
    np.testing.assert_allclose(moved.xyz[0].numpy(), transform(pose, plain.xyz[0].double().numpy()), atol=1e-5)
    assert plain.exists.all() and (plain.intensity == moved.intensity).all()


def test_only_the_keyframes_own_sweep_is_used():
    sample = also_sample(0, 300)
    arrays = {
        **sample.arrays,
        "num_points": np.array([200, 100], np.int32),
        "sweep_origins": np.stack([SENSOR, SENSOR + 9]),
    }
    both = ImgALSO.targets(dataclasses.replace(sample, arrays=arrays), ALSO)
    arrays |= {"num_points": np.array([200], np.int32)}
    one = ImgALSO.targets(dataclasses.replace(sample, arrays=arrays, rng=np.random.default_rng(0)), ALSO)
    assert all(np.array_equal(both[name], one[name]) for name in one)


def test_a_cache_without_returns_is_refused_with_the_remedy():
    with pytest.raises(
        ValueError, match="no LiDAR returns, which img-also draws its queries from: build it with --points"
    ):
        ImgALSO.arrays(ALSO, small_spec())
    assert "points" in ImgALSO.arrays(ALSO, small_spec(max_points=9))


def test_the_table_of_tasks_that_read_points_is_right():
    reading = [
        name for name in PRETEXTS if "points" in Config(name).task_class.arrays(Config(name), small_spec(max_points=9))
    ]
    assert reading == list(READS_POINTS)


def test_queries_depend_on_seed_epoch_and_keyframe_and_in_evaluation_only_on_the_keyframe(tmp_path):
    reader = CacheReader(write_cache(tmp_path, grid=GRID, points=300))

    def queries(seed: int, training: bool, epoch: int, keyframe: int) -> bytes:
        config = dataclasses.replace(ALSO, seed=seed, frame="ego", augment=NO_AUGMENTATION)
        batch = KeyframeDataset(reader, config, training=training).batch([(epoch, keyframe)])
        return drawn_queries(batch).xyz.numpy().tobytes()

    cases = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert len({queries(seed, True, *of) for seed, *of in cases}) == 4
    assert all(queries(seed, True, *of) == queries(seed, True, *of) for seed, *of in cases)
    assert queries(0, False, 0, 2) == queries(1, False, 0, 2) != queries(0, False, 0, 3)

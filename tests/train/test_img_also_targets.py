"""Img-ALSO: queries of a keyframe as targets of a batch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from occfeat_targets.cache.geometry import rigid, transform
from occfeat_targets.cache.reader import CacheReader
from occfeat_train.config import NO_AUGMENTATION, PRETEXTS, READS_POINTS, Config
from occfeat_train.data.dataset import KeyframeDataset
from occfeat_train.data.queries import NO_INTENSITY, NUM_QUERIES
from occfeat_train.tasks.img_also import ImgALSO
from tests.conftest import small_spec
from tests.train.runs import write_cache
from tests.train.test_img_also import ALSO, GRID, SENSOR, also_sample


def test_queries_are_moved_to_the_grid_and_pairs_are_numbered_over_the_batch():
    pose = rigid((1, 0, 0, 0.5), (0.3, -0.2, 0.1))
    plain, moved = (ImgALSO.targets(also_sample(0, 300, pose=p), ALSO) for p in (np.eye(4), pose))
    expected = transform(pose, plain["queries"].astype(np.float64))
    number = int((plain["occupied"] | (plain["queries"] != 0).any(1)).sum())
    assert number > 800
    np.testing.assert_allclose(moved["queries"][:number], expected[:number], atol=1e-5)
    np.testing.assert_array_equal(moved["intensity"], plain["intensity"])
    second = ImgALSO.targets(dataclasses.replace(also_sample(0, 300, pose=pose), index=1), ALSO)
    np.testing.assert_array_equal(second["query"], moved["query"] + NUM_QUERIES)
    np.testing.assert_array_equal(second["cell"], moved["cell"] + 120)


@pytest.mark.parametrize("returns", [0, 1, 300, 400])
def test_a_sweep_of_few_returns_has_fewer_queries_and_the_same_shapes(returns):
    drawn = ImgALSO.targets(also_sample(0, returns), ALSO)
    shapes = [drawn[name].shape for name in ("queries", "occupied", "intensity")]
    assert shapes == [(NUM_QUERIES, 3), (NUM_QUERIES,), (NUM_QUERIES,)]
    assert len(np.unique(drawn["query"])) <= 3 * returns
    assert (drawn["intensity"][3 * returns :] == NO_INTENSITY).all() and not drawn["occupied"][3 * returns :].any()


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
        return batch.arrays["queries"].numpy().tobytes()

    cases = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert len({queries(seed, True, *of) for seed, *of in cases}) == 4
    assert all(queries(seed, True, *of) == queries(seed, True, *of) for seed, *of in cases)
    assert queries(0, False, 0, 2) == queries(1, False, 0, 2) != queries(0, False, 0, 3)

"""The two halves of a probe: keyframes of other scenes, and caches that have none."""

from __future__ import annotations

import numpy as np
import pytest

from occfeat_targets.cache.records import CacheError
from occfeat_targets.probe.halves import choose_halves
from tests.conftest import small_spec
from tests.targets.probe_caches import scenes, write_cache
from tests.targets.test_probe import VEHICLES, cache_of, probe


@pytest.mark.parametrize("seed", range(5))
def test_a_scene_is_never_in_both_halves(tmp_path, seed):
    names = [name for name in scenes(7) for _ in range(3)]
    reader = write_cache(tmp_path / "train.zarr", names)
    halves = choose_halves(reader, samples=5, seed=seed)
    chosen = [{names[k] for k in half.keyframes} for half in halves]
    assert not chosen[0] & chosen[1]
    assert [len(half.keyframes) for half in halves] == [5, 5]
    whole = choose_halves(reader, samples=100, seed=seed)
    assert [half.num_scenes for half in whole] == [4, 3]
    assert sorted(whole[0].keyframes + whole[1].keyframes) == list(range(21))


def test_the_seed_chooses_the_scenes(tmp_path):
    reader = cache_of(tmp_path, 12)
    first, again, other = (choose_halves(reader, seed=seed)[0].keyframes for seed in (0, 0, 1))
    assert first == again != other


def test_skipped_keyframes_and_those_without_a_grid_are_left_out(tmp_path):
    grids = np.zeros((8, 1, 4, 4))
    grids[:7] = np.eye(4)
    reader = write_cache(tmp_path / "train.zarr", scenes(8), is_valid=np.arange(8) != 2, grid_from_ego=grids)
    halves = choose_halves(reader)
    assert sorted(halves[0].keyframes + halves[1].keyframes) == [0, 1, 3, 4, 5, 6]


def test_caches_of_two_splits_are_the_two_halves(tmp_path):
    train, test = cache_of(tmp_path, 3), write_cache(tmp_path / "val.zarr", ["x", "y"], spec=small_spec(**VEHICLES))
    halves = choose_halves(train, test)
    assert [half.keyframes for half in halves] == [(0, 1, 2), (0, 1)]
    assert halves[1].reader is test


def test_a_cache_without_a_teacher_has_nothing_to_probe(tmp_path):
    reader = write_cache(tmp_path / "train.zarr", scenes(4), spec=small_spec(teacher=None))
    with pytest.raises(CacheError, match="has no features .*nothing to probe: build a cache with a teacher"):
        probe(reader)


def test_a_cache_without_labels_has_no_classes(tmp_path):
    reader = write_cache(tmp_path / "train.zarr", scenes(4), spec=small_spec(labels=()))
    with pytest.raises(CacheError, match="has no labels"):
        probe(reader)


def test_one_scene_without_a_test_split_is_refused(tmp_path):
    reader = write_cache(tmp_path / "train.zarr", ["scene-0061"] * 6)
    with pytest.raises(ValueError, match="are all of scene-0061: .* Pass --test-split"):
        probe(reader)


def test_caches_that_share_a_scene_are_refused(tmp_path):
    train = cache_of(tmp_path, 3)
    with pytest.raises(ValueError, match="share 3 scenes .*scene-0000"):
        probe(train, train)


def test_caches_of_other_options_are_refused(tmp_path):
    train = cache_of(tmp_path, 3)
    test = write_cache(tmp_path / "val.zarr", ["x"], spec=small_spec(feature_dtype="int8", **VEHICLES))
    with pytest.raises(CacheError, match="feature_dtype: float16 != int8"):
        probe(train, test)


def test_a_cache_without_a_usable_keyframe_is_refused(tmp_path):
    reader = write_cache(tmp_path / "train.zarr", scenes(3), is_valid=False)
    with pytest.raises(CacheError, match="no keyframe with targets in frame ego"):
        probe(reader)


def test_a_half_without_a_visible_voxel_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no camera sees an occupied voxel in 2 keyframes"):
        probe(cache_of(tmp_path, 4, occupancy=0))


def test_no_samples_are_refused(tmp_path):
    with pytest.raises(ValueError, match="samples=0: at least 1"):
        probe(cache_of(tmp_path), samples=0)

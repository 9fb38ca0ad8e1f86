"""From a cache to batches: order of samples, contents of batches, and arrays that are never read."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from occfeat_targets.cache.create import create_cache
from occfeat_targets.cache.geometry import inverse_rigid
from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.cache.records import CacheError
from occfeat_targets.cache.spec import CAMERAS, EGO_FRAME, TargetSpec
from occfeat_targets.cache.store import Cache, Identity
from occfeat_train.config import NO_AUGMENTATION, AugmentConfig, Config, LossConfig, NetworkConfig
from occfeat_train.data.augment import draw
from occfeat_train.data.batch import Sample, collate
from occfeat_train.data.dataset import KeyframeDataset
from occfeat_train.data.frames import reference_frames
from occfeat_train.tasks.pretraining import Pretraining
from tests.conftest import random_arrays, small_identity, small_spec
from tests.train.runs import assert_same

ALL_FRAMES = (EGO_FRAME, *CAMERAS)
# small_spec has images of 16x24, so they are enlarged.
PRETRAIN = Config(network=NetworkConfig(weights="none", channels=8, image_size=(32, 48)), seed=3, allow_upsampling=True)
VEHICLES = dataclasses.replace(PRETRAIN, task="vehicles")
MAP = dataclasses.replace(PRETRAIN, task="map")
SCENES = Identity(tuple(f"token{i}" for i in range(7)), tuple("aabbbcc"), tuple(range(7)))


def write_cache(
    path: Path, spec: TargetSpec | None = None, identity: Identity | None = None, skipped: tuple[int, ...] = ()
) -> Cache:
    """A finished cache of random arrays in shards of 3."""
    cache = create_cache(
        path / "train.zarr", spec or small_spec(), identity or small_identity(), keyframes_per_shard=3, provenance={}
    )
    for shard in range(cache.num_shards):
        arrays = random_arrays(cache, shard)
        for keyframe in set(skipped) & set(cache.shard_range(shard)):
            arrays["is_valid"][keyframe - cache.shard_range(shard).start] = False
        cache.write_shard(shard, arrays, {"skipped": {}, "cosine": None})
    return cache


def contents(cache: Cache) -> dict[str, np.ndarray]:
    """{array: (keyframes, ...)} that `write_cache` wrote."""
    shards = [random_arrays(cache, shard) for shard in range(cache.num_shards)]
    return {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}


def dataset_of(cache: Cache, config: Config = PRETRAIN, **options: Any) -> KeyframeDataset:
    return KeyframeDataset(CacheReader(cache), config, **{"training": True, **options})


# -- the stream -------------------------------------------------------------------------------------------------------


def test_each_epoch_visits_every_sample_once_in_another_order(tmp_path):
    dataset = dataset_of(write_cache(tmp_path))
    epochs = [[dataset.stream(epoch * 7 + i) for i in range(7)] for epoch in range(4)]
    orders = []
    for number, samples in enumerate(epochs):
        assert {epoch for epoch, _ in samples} == {number}
        orders.append(tuple(keyframe for _, keyframe in samples))
        assert sorted(orders[-1]) == list(range(7))
    assert len(set(orders)) == 4


def test_batches_cross_epochs_without_dropping_samples(tmp_path):
    dataset = dataset_of(write_cache(tmp_path))
    batch = dataset.batch([dataset.stream(position) for position in range(5, 9)])
    expected = [dataset.stream(position)[1] for position in range(5, 9)]
    assert [dataset.stream(position)[0] for position in range(5, 9)] == [0, 0, 1, 1]
    assert batch.tokens == tuple(f"token{keyframe}" for keyframe in expected)


def test_the_seed_determines_the_order(tmp_path):
    cache = write_cache(tmp_path)
    orders = [
        [dataset_of(cache, dataclasses.replace(PRETRAIN, seed=seed)).stream(i)[1] for i in range(21)]
        for seed in (3, 3, 4)
    ]
    assert orders[0] == orders[1] != orders[2]


def test_skipped_keyframes_are_not_used(tmp_path):
    dataset = dataset_of(write_cache(tmp_path, skipped=(0, 4)))
    assert dataset.keyframes.tolist() == [1, 2, 3, 5, 6]
    assert sorted(dataset.stream(i)[1] for i in range(5)) == [1, 2, 3, 5, 6]


def test_only_keyframes_of_the_chosen_scenes_are_used(tmp_path):
    cache = write_cache(tmp_path, identity=SCENES, skipped=(6,))
    assert dataset_of(cache, scenes=["a", "c"]).keyframes.tolist() == [0, 1, 5]
    with pytest.raises(ValueError, match="no valid keyframe among the 2 of the chosen scenes"):
        dataset_of(write_cache(tmp_path / "skipped", identity=SCENES, skipped=(0, 1)), scenes=["a"])


def test_without_a_choice_of_scenes_an_error_names_none(tmp_path):
    cache = write_cache(tmp_path, skipped=tuple(range(7)))
    with pytest.raises(ValueError, match="no valid keyframe among the 7$"):
        dataset_of(cache)


# -- contents of a batch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature_dtype", ["float16", "int8"])
def test_a_pretraining_batch_has_the_contents_of_the_cache(tmp_path, feature_dtype):
    cache = write_cache(tmp_path, small_spec(frames=ALL_FRAMES, feature_dtype=feature_dtype))
    written, samples = contents(cache), [(0, 5), (2, 0), (0, 3)]
    dataset = dataset_of(cache)
    batch = dataset.batch(samples)
    keyframes = [5, 0, 3]
    frames = [drawn_frame(sample) for sample in samples]
    np.testing.assert_array_equal(batch.images, written["images"][keyframes])
    np.testing.assert_array_equal(batch.intrinsics, written["intrinsics"][keyframes])
    targets = []
    for row, (keyframe, frame) in enumerate(zip(keyframes, frames, strict=True)):
        grid_from_ego = written["grid_from_ego"][keyframe, frame].astype(np.float64)
        expected = written["cam_from_ego"][keyframe].astype(np.float64) @ inverse_rigid(grid_from_ego)
        np.testing.assert_allclose(batch.cam_from_grid[row], expected)
        arrays = {name: written[name][keyframe] for name in dataset.arrays if name.startswith("feature")}
        arrays["occupancy"] = written["occupancy"][keyframe, frame]
        of_cameras = (batch.images[row].numpy(), batch.intrinsics[row].numpy(), batch.cam_from_grid[row].numpy())
        sample = Sample(row, dataset.grid, cache.spec.image_size, *of_cameras, arrays, np.random.default_rng())
        targets.append(Pretraining.targets(sample, PRETRAIN))
    assert (batch.intrinsics.dtype, batch.cam_from_grid.dtype) == (torch.float64, torch.float64)
    assert ("feature_scale" in dataset.arrays) == (feature_dtype == "int8")
    assert_same(batch.arrays, collate(targets, ["voxels", "features"]))
    assert batch.grid == cache.spec.grid


def drawn_frame(sample: tuple[int, int], config: Config = PRETRAIN, frames: tuple[str, ...] = ALL_FRAMES) -> int:
    allowed = reference_frames(frames, config.frame, training=True)
    rng = np.random.default_rng((config.seed, *sample))
    return draw(rng, config.augment, config.network.image_size, len(CAMERAS), allowed).frame


def test_labels_belong_to_the_chosen_frame(tmp_path):
    cache = write_cache(tmp_path, small_spec(frames=ALL_FRAMES))
    written, samples = contents(cache), [(0, 5), (2, 0), (0, 3)]
    at = ([5, 0, 3], [drawn_frame(sample) for sample in samples])
    vehicles = dataset_of(cache, VEHICLES).batch(samples).arrays
    np.testing.assert_array_equal(vehicles["labels"][:, 0], written["labels/vehicles"][at])
    np.testing.assert_array_equal(vehicles["valid"][:, 0], written["labels/vehicles_valid"][at])
    layout = dataset_of(cache, MAP).batch(samples).arrays
    np.testing.assert_array_equal(layout["labels"], written["labels/map"][at])
    assert (list(vehicles), list(layout)) == (["labels", "valid"], ["labels"])


def test_a_pinned_batch_is_read_at_once_into_pinned_memory_and_is_the_same(tmp_path, monkeypatch):
    dataset, pinned = dataset_of(write_cache(tmp_path)), []
    plain, empty = dataset.batch([(0, 1), (4, 6)]), torch.empty

    def pinnable(*given: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        made = empty(*given, **options)  # pinned memory needs a GPU
        pinned.extend([made.data_ptr()] * pin_memory)
        return made

    monkeypatch.setattr(torch, "empty", pinnable)
    batch = dataset.batch([(0, 1), (4, 6)], pinned=True)
    assert set(pinned) == {t.data_ptr() for t in (batch.images, *batch.arrays.values())}
    for ours, theirs in zip(batch.tensors(), plain.tensors(), strict=True):
        assert torch.equal(ours, theirs)


def test_augmentation_depends_only_on_seed_epoch_and_sample(tmp_path):
    dataset = dataset_of(write_cache(tmp_path, small_spec(frames=ALL_FRAMES)))
    together, alone = dataset.batch([(0, 1), (4, 6), (1, 1)]), dataset.batch([(4, 6)])
    for field in dataclasses.fields(alone):
        value = getattr(alone, field.name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(value[0], getattr(together, field.name)[1]), field.name
    assert not torch.equal(together.resized[0], together.resized[2])  # the same sample in another epoch


def test_evaluation_uses_all_cameras_without_augmentation(tmp_path):
    config = dataclasses.replace(PRETRAIN, augment=AugmentConfig(num_cameras=2))
    cache = write_cache(tmp_path, small_spec(frames=ALL_FRAMES))
    batch = dataset_of(cache, config, training=False).batch([(0, k) for k in range(7)])
    assert (batch.resized == torch.tensor([32, 48])).all()
    assert not (batch.crop.any() or batch.mirror.any() or batch.bev_flip.any())
    assert batch.cameras.tolist() == [list(range(6))] * 7
    front = ALL_FRAMES.index("CAM_FRONT")
    np.testing.assert_array_equal(batch.arrays["occupancy"], contents(cache)["occupancy"][:, front])
    assert dataset_of(cache, config).batch([(0, 0)]).cameras.shape == (1, 2)


# -- arrays that a task reads -----------------------------------------------------------------------------------------


def test_pretraining_never_reads_labels(tmp_path):
    cache = write_cache(tmp_path)
    pretraining, vehicles = dataset_of(cache), dataset_of(cache, VEHICLES)
    for chunks in (cache.path / "labels").glob("*/c"):
        shutil.rmtree(chunks)
    assert pretraining.batch([(0, k) for k in range(7)]).images.shape[0] == 7
    with pytest.raises(CacheError, match="sample token2"):
        vehicles.batch([(0, 2)])


def test_pretraining_needs_no_labels(tmp_path):
    cache = write_cache(tmp_path, small_spec(labels=()))
    dataset = dataset_of(cache)
    assert sorted(dataset.arrays) == ["features", "images", "occupancy"]
    assert list(dataset.batch([(0, 2)]).arrays) == ["occupancy", "voxels", "features"]


def test_finetuning_reads_neither_features_nor_occupancy(tmp_path):
    cache = write_cache(tmp_path)
    for name in ("features", "occupancy"):
        shutil.rmtree(cache.path / name / "c")
    assert dataset_of(cache, MAP).arrays == ("images", "labels/map")
    assert list(dataset_of(cache, MAP).batch([(0, 4)]).arrays) == ["labels"]


def test_only_the_feature_loss_needs_a_teacher(tmp_path):
    cache = write_cache(tmp_path, small_spec(teacher=None))
    with pytest.raises(CacheError, match="no teacher features, which lambda=0.01 needs: .*--teacher.*--occ-only"):
        dataset_of(cache)
    batch = dataset_of(cache, dataclasses.replace(PRETRAIN, loss=LossConfig(feat=0))).batch([(0, 0)])
    assert list(batch.arrays) == ["occupancy"]


@pytest.mark.parametrize(("labels", "has"), [(("vehicles",), "vehicles"), ((), "none")])
def test_missing_labels_are_named_with_the_remedy(tmp_path, labels, has):
    cache = write_cache(tmp_path, small_spec(labels=labels))
    with pytest.raises(CacheError, match=rf"no map labels \(it has: {has}\): build it with --label-kinds map"):
        dataset_of(cache, MAP)


def test_num_cameras_above_the_number_of_cameras_is_refused(tmp_path):
    config = dataclasses.replace(PRETRAIN, augment=AugmentConfig(num_cameras=7))
    cache = write_cache(tmp_path)
    with pytest.raises(ValueError, match=r"augment.num_cameras=7: the cache has 6"):
        dataset_of(cache, config)
    dataset_of(cache, config, training=False)


# -- reference frames -------------------------------------------------------------------------------------------------


def names(available: tuple[str, ...], wanted: str, training: bool) -> list[str]:
    return [available[i] for i in reference_frames(available, wanted, training=training)]


@pytest.mark.parametrize("wanted", ["auto", "cameras"])
def test_training_uses_five_cameras_as_frames_and_evaluation_the_front(wanted):
    for available in (ALL_FRAMES, CAMERAS):
        assert names(available, wanted, True) == [c for c in CAMERAS if c != "CAM_FRONT_LEFT"]
        assert names(available, wanted, False) == ["CAM_FRONT"]


def test_auto_is_the_ego_frame_if_it_is_the_only_one():
    assert names((EGO_FRAME,), "auto", True) == names((EGO_FRAME,), "auto", False) == [EGO_FRAME]


@pytest.mark.parametrize("wanted", ["ego", "CAM_BACK", "CAM_FRONT_LEFT"])
@pytest.mark.parametrize("training", [True, False])
def test_a_named_frame_is_the_only_one(wanted, training):
    assert names(ALL_FRAMES, wanted, training) == [wanted]


def test_a_cache_with_other_cameras_uses_these():
    assert names(("CAM_FRONT_LEFT",), "cameras", True) == ["CAM_FRONT_LEFT"]
    assert names(("CAM_BACK", "CAM_FRONT_LEFT"), "cameras", False) == ["CAM_BACK"]


@pytest.mark.parametrize(
    ("available", "wanted"), [((EGO_FRAME,), "cameras"), (CAMERAS, "ego"), ((EGO_FRAME,), "CAM_BACK")]
)
@pytest.mark.parametrize("training", [True, False])
def test_a_missing_frame_is_refused_with_the_list_of_frames(available, wanted, training):
    with pytest.raises(ValueError, match=f"frame={wanted}: this cache has grids in {', '.join(available)}"):
        reference_frames(available, wanted, training=training)


def test_without_random_frames_training_uses_the_frame_of_evaluation(tmp_path):
    cache = write_cache(tmp_path, small_spec(frames=ALL_FRAMES))
    config = dataclasses.replace(PRETRAIN, augment=NO_AUGMENTATION)
    ours, evaluations = (
        dataset_of(cache, config, training=training).batch([(0, k) for k in range(7)]) for training in (True, False)
    )
    assert torch.equal(ours.arrays["occupancy"], evaluations.arrays["occupancy"])
    assert torch.equal(ours.cam_from_grid, evaluations.cam_from_grid)

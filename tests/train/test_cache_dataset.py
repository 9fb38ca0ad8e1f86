"""A cache as a torch data set, and the features of its voxels."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import occfeat_train
from occfeat_targets.cache.reader import CacheReader
from occfeat_train.training.stages import RunOptions, prepare_evaluation
from tests.train.runs import WORKERS, reader, write_cache

CALIBRATION = ("camera_valid", "image_area", "intrinsics", "cam_from_ego", "grid_from_ego")


@WORKERS
def test_a_dataloader_with_workers_gives_a_caches_keyframes(cache):
    dataset = pickle.loads(pickle.dumps(occfeat_train.open_cache(cache / "train.zarr")))  # as for spawned workers
    loader = DataLoader(dataset, batch_size=2, num_workers=2)
    batches, opened = list(loader), reader(cache)
    assert [len(batch["token"]) for batch in batches] == [2, 2, 2, 1]
    assert tuple(token for batch in batches for token in batch["token"]) == dataset.tokens
    found = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0] if name != "token"}
    shapes = {name: (value.dtype, tuple(value.shape[1:])) for name, value in found.items()}
    assert shapes == {
        "camera_valid": (torch.bool, (6,)),
        "image_area": (torch.int32, (6, 4)),
        "images": (torch.uint8, (6, 3, 40, 60)),
        "intrinsics": (torch.float32, (6, 3, 3)),
        "cam_from_ego": (torch.float32, (6, 4, 4)),
        "grid_from_ego": (torch.float32, (3, 4, 4)),
        "occupancy": (torch.bool, (3, 4, 12, 12)),
        "features": (torch.float16, (6, 2, 3, 6)),
        "vehicles": (torch.bool, (3, 12, 12)),
        "vehicles_valid": (torch.bool, (3, 12, 12)),
        "map": (torch.bool, (3, 5, 12, 12)),
    }
    grid = opened.cache.spec.grid
    for keyframe in range(len(opened)):
        stored = {name: found[name][keyframe].numpy() for name in found}
        for name in (*CALIBRATION, "features"):
            assert np.array_equal(stored[name], opened.read(name, keyframe))
        assert np.array_equal(stored["images"], opened.read("images", keyframe).transpose(0, 3, 1, 2))
        assert np.array_equal(grid.pack_volume(stored["occupancy"]), opened.read("occupancy", keyframe))
        for name in ("vehicles", "vehicles_valid", "map"):
            expected = grid.unpack_map(opened.read(f"labels/{name}", keyframe))
            assert np.array_equal(stored[name], expected)


def test_a_data_set_omits_skipped_keyframes_and_keys_that_were_not_requested(tmp_path):
    def skip(arrays: dict[str, np.ndarray]) -> None:
        arrays["is_valid"][2] = False

    write_cache(tmp_path, change=skip, dim=0, labels=("map",))
    dataset = occfeat_train.open_cache(tmp_path / "train.zarr", keys=["map"])
    assert len(dataset) == 6 and "train-token2" not in dataset.tokens
    assert dataset.scenes == tuple("aabbcc") and dataset.simulated == ("all of it",)
    assert [sample["token"] for sample in dataset] == list(dataset.tokens)
    assert dataset[-1]["token"] == "train-token6"
    assert sorted(dataset[0]) == sorted([*CALIBRATION, "map", "token"])
    with pytest.raises(ValueError, match="has no features, cars: ask for some of images, occupancy, map, or build it"):
        occfeat_train.open_cache(tmp_path / "train.zarr", keys=["images", "features", "cars"])
    with pytest.raises(ValueError, match=r"keys='images' is a string: pass a list, such as \['images'\]"):
        occfeat_train.open_cache(tmp_path / "train.zarr", keys="images")


@pytest.mark.parametrize("occlusion", ["none", "zbuffer"])
def test_voxel_features_equal_the_targets_of_pretraining(cache, pretrained, tmp_path, occlusion):
    _, keyframes, _ = prepare_evaluation(pretrained, RunOptions(cache, "val", tmp_path), None)
    keyframes.config = keyframes.config.override([f"loss.occlusion={occlusion}"])
    batch = keyframes.batch([(0, 3)])
    voxels, expected = batch.arrays["voxels"], batch.arrays["features"]

    dataset = occfeat_train.open_cache(cache / "val.zarr")
    sample, frame = dataset[3], dataset.frames.index("CAM_FRONT")
    centers = torch.from_numpy(dataset.grid.voxel_centers())[sample["occupancy"][frame]]
    given = {"intrinsics": sample["intrinsics"], "cam_from_ego": sample["cam_from_ego"], "image_size": (40, 60)}
    given["grid_from_ego"] = sample["grid_from_ego"][frame]
    given["cell_size"] = dataset.grid.cell_size if occlusion == "zbuffer" else None
    found, num_views = occfeat_train.voxel_features(sample["features"], centers, **given)
    assert found.dtype == torch.float32 and len(found) == int(sample["occupancy"][frame].sum())
    assert (found[num_views == 0] == 0).all()
    torch.testing.assert_close(found[num_views > 0].half(), expected, rtol=2e-3, atol=2e-3)
    assert len(voxels) == int((num_views > 0).sum())

    maps = sample["features"].float().requires_grad_()
    differentiable, _ = occfeat_train.voxel_features(maps, centers, **given)
    torch.testing.assert_close(differentiable, found, rtol=1e-4, atol=1e-4)
    differentiable.sum().backward()
    # The weights of a visible voxel sum to 1 over all tokens.
    torch.testing.assert_close(
        maps.grad.sum((0, 1, 2)), torch.full((6,), float((num_views > 0).sum())), rtol=1e-4, atol=0
    )


def test_int8_features_are_multiplied_by_their_scale(tmp_path, monkeypatch):
    """The test caches have no int8 features, so these arrays replace what the reader returns."""
    dataset = occfeat_train.open_cache(write_cache(tmp_path).path, keys=["features"])
    tokens = np.arange(-8, 8, dtype=np.int8).reshape(1, 2, 2, 4)
    scale = np.array([[[0.5, 1], [2, 0.25]]], np.float16)
    arrays = {"features": tokens, "feature_scale": scale}
    read = CacheReader.read
    monkeypatch.setattr(
        CacheReader, "read", lambda self, name, i: arrays[name] if name in arrays else read(self, name, i)
    )
    found = dataset[0]["features"]
    assert found.dtype == torch.float16
    assert np.array_equal(found.numpy(), tokens * scale[..., None])

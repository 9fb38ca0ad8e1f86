"""A pretraining on several caches: one stream of all keyframes, with other numbers of cameras and sizes of images."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from occfeat_targets.cache.create import create_cache
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.cache.records import CacheError
from occfeat_targets.cache.spec import CAMERAS, TargetSpec, TeacherSpec
from occfeat_targets.cache.store import Cache, Identity
from occfeat_train.config import LIFTINGS, AugmentConfig, Config, NetworkConfig
from occfeat_train.data.augment import resample, transform_area, transform_intrinsics
from occfeat_train.data.dataset import KeyframeDataset
from occfeat_train.data.mixture import MixedDataset
from occfeat_train.tasks.build import build_task
from occfeat_train.training.checkpoint import RunInfo
from occfeat_train.training.paper import differences
from tests.train.runs import (
    GRID,
    assert_same,
    assert_same_run,
    config_of,
    finetune,
    interrupt_at,
    pretrain,
    random_keyframes,
    reader,
    refuse,
    steps,
    stop_early,
    succeed,
    write_cache,
)

THREE = ("left", "CAM_FRONT", "right")  # cameras of another data set
CONFIG = Config(
    network=NetworkConfig(weights="none", channels=8, image_size=(32, 48), drop_connect=0.0, freeze_batchnorm=True),
)


def write_other(folder: Path, *, number: int = 4, letterboxed: bool = False, points: int = 0, **changes: Any) -> Cache:
    """A cache of three cameras and smaller images, of the same grid and teacher as `write_cache`'s."""
    teacher = changes.pop("teacher", TeacherSpec("elsewhere", "digest of made up", (14, 28), 14, 6))
    values = {
        "grid": GRID, "frames": ("ego", "CAM_FRONT"), "cameras": THREE, "image_size": (39, 58), "labels": (), **changes
    }  # fmt: skip
    spec = TargetSpec(teacher=teacher, max_points=points, **values)
    identity = Identity(tuple(f"other{i}" for i in range(number)), ("o",) * number, tuple(range(number)))
    cache = create_cache(
        folder / "train.zarr", spec, identity, keyframes_per_shard=2, provenance={"simulated": ["cameras"]}
    )
    arrays = random_keyframes(spec, range(number), 5)
    if letterboxed:
        arrays["image_area"][:, 0] = (3, 0, 30, 58)
    for shard in range(cache.num_shards):
        rows = cache.shard_range(shard)
        cache.write_shard(shard, {name: a[rows.start : rows.stop] for name, a in arrays.items()}, {"skipped": {}})
    return cache


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    return write_other(tmp_path_factory.mktemp("other")).path.parent


def mixed(*caches: Path, config: Config = CONFIG) -> MixedDataset:
    return MixedDataset([reader(cache) for cache in caches], dataclasses.replace(config, frame="cameras"))


def test_every_keyframe_of_every_cache_occurs_once_per_epoch_in_an_order_given_by_the_seed(cache, other):
    dataset = mixed(cache, other)
    assert len(dataset) == 7 + 4
    orders = [[dataset.stream(11 * epoch + i) for i in range(11)] for epoch in (0, 1, 2)]
    for epoch, order in enumerate(orders):
        assert sorted(order) == [(epoch, number) for number in range(11)]
    assert len({tuple(number for _, number in order) for order in orders}) == 3
    tokens = dataset.batch(orders[0]).tokens
    assert Counter(token.startswith("other") for token in tokens) == {False: 7, True: 4}
    seeded = mixed(cache, other, config=dataclasses.replace(CONFIG, seed=1))
    assert [seeded.stream(i) for i in range(11)] != orders[0]


def test_a_mixture_of_one_cache_is_that_cache(cache):
    config = dataclasses.replace(CONFIG, frame="cameras")
    alone = KeyframeDataset(reader(cache), config, training=True)
    dataset = mixed(cache)
    assert [dataset.stream(i) for i in range(20)] == [alone.stream(i) for i in range(20)]
    samples = [alone.stream(i) for i in (3, 9, 4)]
    ours, theirs = dataset.batch(samples), alone.batch(samples)
    for field in dataclasses.fields(ours):
        assert_same(getattr(ours, field.name), getattr(theirs, field.name), field.name)


def test_samples_of_a_batch_keep_their_cameras_images_and_targets(cache, tmp_path):
    """Sample 1 of the batch is from the other cache: three cameras of 39x58, one with black borders."""
    other = write_other(tmp_path, letterboxed=True).path.parent
    dataset, size = mixed(cache, other), (32, 48)
    batch = dataset.batch([(0, 2), (0, 7 + 1)])
    alone = KeyframeDataset(reader(other), dataset.config, training=True, first=7).batch([(0, 1)])
    assert batch.images.shape == (2, 6, 40, 60, 3) and alone.images.shape == (1, 3, 39, 58, 3)
    assert batch.source_size.tolist() == [[[40, 60]] * 6, [[39, 58]] * 6]
    assert torch.equal(batch.images[1, :3, :39, :58], alone.images[0])
    assert not batch.images[1, :, 39:].any() and not batch.images[1, :, :, 58:].any()
    assert torch.equal(batch.images[1, 3:], batch.images[1, :3])  # masked cameras show real images
    assert not batch.cam_from_grid[1, 3:].any() and batch.cam_from_grid[0].any(-1).any(-1).all()
    assert sorted(batch.cameras[1].tolist()) == list(range(6)) and batch.cameras[1, 3:].tolist() == [3, 4, 5]
    ours, theirs = batch.views(size), alone.views(size)
    torch.testing.assert_close(ours.images[1, :3], theirs.images[0], rtol=0, atol=1e-6)
    for name in ("intrinsics", "cam_from_grid", "area"):
        assert torch.equal(getattr(ours, name)[1, :3], getattr(theirs, name)[0]), name
    of_other = batch.arrays["voxels"] >= GRID.num_voxels
    assert torch.equal(batch.arrays["voxels"][of_other] - GRID.num_voxels, alone.arrays["voxels"])
    assert torch.equal(batch.arrays["features"][of_other], alone.arrays["features"])


@pytest.mark.parametrize("is_mirrored", [False, True])
def test_pixels_beyond_an_image_are_never_sampled(is_mirrored):
    """The twin resamples the image alone."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (1, 1, 13, 21, 3), generator=generator, dtype=torch.uint8)
    padded = torch.full((1, 1, 20, 40, 3), 255, dtype=torch.uint8)
    padded[:, :, :13, :21] = image
    source = torch.tensor([[[13, 21]]])
    for resized in ((26, 42), (9, 15), (13, 21)):
        draws = torch.tensor([[resized]]), torch.tensor([[[1, -3]]]), torch.tensor([[is_mirrored]]), (12, 18)
        torch.testing.assert_close(resample(padded, *draws, source), resample(image, *draws), rtol=0, atol=1e-6)
        pinhole = torch.tensor([[[[20.0, 0, 10], [0, 20, 6], [0, 0, 1]]]]).double()
        assert torch.equal(
            transform_intrinsics(pinhole, source, *draws), transform_intrinsics(pinhole, (13, 21), *draws)
        )
        area = torch.tensor([[[2.0, 0, 13, 21]]]).double()
        assert torch.equal(transform_area(area, source, *draws), transform_area(area, (13, 21), *draws))


@pytest.mark.parametrize(("lifting", "num_cameras"), [*((name, 0) for name in LIFTINGS), ("simplebev", 2)])
def test_the_loss_of_a_mixed_batch_is_the_mean_of_its_samples_losses(cache, other, lifting, num_cameras):
    """And so is the gradient. Every sample alone is read from its own cache, without masked cameras and padding."""
    config = dataclasses.replace(
        CONFIG,
        frame="cameras",
        network=dataclasses.replace(CONFIG.network, lifting=lifting),
        augment=AugmentConfig(num_cameras=num_cameras),
    )
    dataset = mixed(cache, other, config=config)
    samples = [(0, 3), (0, 8), (1, 10)]
    single = [KeyframeDataset(reader(c), config, training=True, first=n) for c, n in ((cache, 0), (other, 7))]
    batches = [single[number >= 7].batch([(epoch, number - 7 * (number >= 7))]) for epoch, number in samples]
    task = build_task(config, GRID, 6).eval().double()

    def losses_and_gradients(batches: list[Any]) -> dict[str, torch.Tensor]:
        task.zero_grad()
        sums: dict[str, torch.Tensor] = Counter()
        for batch in batches:
            losses = task(batch)
            (losses["loss"] / len(batches)).backward()
            for name, loss in losses.items():
                sums[name] += loss.detach() / len(batches)
        return {**sums, **{name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}}

    task.network.register_forward_pre_hook(
        lambda _, inputs: (dataclasses.replace(inputs[0], images=inputs[0].images.double()), *inputs[1:])
    )
    found, expected = losses_and_gradients([dataset.batch(samples)]), losses_and_gradients(batches)
    assert found.keys() == expected.keys() and len(found) > 50
    for name, value in expected.items():
        scale = max(float(value.abs().max()), 1e-6)
        torch.testing.assert_close(
            found[name] / scale, value / scale, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_img_also_mixes_caches_with_other_numbers_of_points_and_teachers(tmp_path):
    """Its queries need no teacher, so the caches need not have the same."""
    first = write_cache(tmp_path / "first", points=300)
    other = write_other(tmp_path / "other", points=200, teacher=None)
    config = dataclasses.replace(CONFIG, task="img-also", frame="ego")
    dataset = MixedDataset([CacheReader(first), CacheReader(other)], config)
    losses = build_task(config, GRID, 6).eval()(dataset.batch([dataset.stream(i) for i in range(4)]))
    assert torch.isfinite(losses["loss"])


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": VoxelGrid((4, 12, 16), (-2, -6, -8), (2, 6, 8))}, "caches of one pretraining must have the same"),
        (
            {"teacher": TeacherSpec("other", "another digest", (28, 42), 14, 6)},
            "different teachers .digest: digest of made up != another digest.*--occ-only",
        ),
        (
            {"teacher": TeacherSpec("other", "digest of made up", (28, 42), 14, 6, layer="pre-norm")},
            "different teachers .layer: post-norm != pre-norm",
        ),
        ({"teacher": None}, "no teacher features, which lambda=0.01 needs"),
        ({"frames": ("ego",)}, "frame=cameras: this cache has grids in ego"),
    ],
)
def test_caches_that_do_not_belong_together_are_refused_with_both_values(cache, tmp_path, changes, message):
    other = write_other(tmp_path, **changes).path.parent
    with pytest.raises(CacheError, match=message):
        mixed(cache, other)


def test_occupancy_alone_needs_no_common_teacher(cache, tmp_path):
    other = write_other(tmp_path, teacher=None).path.parent
    config = dataclasses.replace(CONFIG, loss=dataclasses.replace(CONFIG.loss, feat=0.0))
    assert len(mixed(cache, other, config=config)) == 11


def command(caches: tuple[Path, ...], out: Path, *more: object) -> list[str]:
    further = [option for cache in caches[1:] for option in ("--cache", cache)]
    return pretrain(caches[0], out, *further, *more)


def test_the_command_line_refuses_caches_that_cannot_be_mixed(cache, other, tmp_path):
    assert "pass each cache once" in refuse(*command((cache, cache), tmp_path / "run"), out=tmp_path / "run")
    message = refuse(*finetune(cache, tmp_path / "run", "--cache", other), out=tmp_path / "run")
    assert "--cache is given 2 times: only a pretraining mixes caches" in message
    ego = write_other(tmp_path / "ego", frames=("ego",)).path.parent
    message = refuse(*command((cache, ego), tmp_path / "run"), out=tmp_path / "run")
    assert "frame=auto is not the same for all caches" in message and "--set frame=ego" in message
    message = refuse(*command((cache, other), tmp_path / "run", "--set", "augment.num_cameras=4"), out=tmp_path / "run")
    assert "augment.num_cameras=4: the cache has 3" in message and str(other) in message
    small = write_other(tmp_path / "small", image_size=(30, 58)).path.parent
    message = refuse(*command((cache, small), tmp_path / "run"), out=tmp_path / "run")
    assert f"{small / 'train.zarr'} has images of 30x58" in message


# -- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_on_two_caches_continues_bit_for_bit_and_only_on_the_same_caches(cache, other, tmp_path, monkeypatch):
    more = ["--validate", "val", "--save-every", 3, *steps(6, samples=11)]
    output = succeed(*command((cache, other), tmp_path / "whole", *more))
    assert f"mixed from 7 of {cache / 'train.zarr'}, 4 of {other / 'train.zarr'}, each once per epoch" in output
    assert "11 samples" in output and "SIMULATED: all of it" in output and "SIMULATED: cameras" in output
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        stop_early(*command((cache, other), tmp_path / "run", *more))
    for caches, difference in (((cache,), "cache fingerprint: "), ((other, cache), "cache fingerprint: ")):
        without_val = [each for each in more if each not in ("--validate", "val")]
        assert difference in refuse(*command(caches, tmp_path / "run", *without_val))
    assert "continuing at step 4 of 6" in succeed(*command((cache, other), tmp_path / "run", *more))
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    info = RunInfo.from_dict(json.loads((tmp_path / "run" / "config.json").read_text()))
    fingerprints = [reader(each).cache.spec.fingerprint for each in (cache, other)]
    assert (
        info.cache == "+".join(fingerprints) and info.num_samples == 11 and info.simulated == ("all of it", "cameras")
    )
    assert [TargetSpec.from_dict(t).fingerprint for t in (info.targets, *info.more_targets)] == fingerprints
    assert (info.data["caches"], info.data["keyframes"]) == (2, 11)
    found = {(d.field, d.here) for d in differences(info)}
    sizes = {("targets.teacher.input_size", size) for size in ("14x28", "28x42")}
    assert {("data.caches", "2"), *sizes} <= found


def test_a_single_cache_writes_no_field_of_a_mixture(pretrained):
    saved = json.loads((pretrained / "config.json").read_text())
    assert "+" not in saved["cache"] and saved["more_targets"] == [] and "caches" not in saved["data"]
    older = {name: value for name, value in saved.items() if name != "more_targets"}
    assert RunInfo.from_dict(older) == RunInfo.from_dict(saved)
    assert config_of(pretrained)["teacher"] == "any"


def test_the_environment_variable_holds_one_cache_even_with_a_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_cache(tmp_path / "a:b")
    monkeypatch.setenv("OCCFEAT_CACHE", str(tmp_path / "a:b"))
    arguments = pretrain(tmp_path, tmp_path / "run", *steps(1))
    del arguments[1:3]  # --cache
    assert "7 samples" in succeed(*arguments)


def test_the_default_name_of_a_run_says_how_many_caches(cache, other, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = command((cache, other), tmp_path, *steps(1, samples=11))
    at = arguments.index("--out")
    del arguments[at : at + 2]
    succeed(*arguments)
    assert (tmp_path / "runs" / "table1-simplebev-enb0-occfeat-2-caches").is_dir()


assert set(THREE) & set(CAMERAS) == {"CAM_FRONT"}

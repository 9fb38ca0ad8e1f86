"""Corrupted caches: the images are corrupted, everything else is that of the clean cache, and the options do what they say."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import zarr

from occfeat_targets.build.corrupted_plan import corrupted_spec
from occfeat_targets.build.planned import open_plan
from occfeat_targets.build_command import build
from occfeat_targets.cache.corruption import CORRUPTIONS, SEVERITIES, CorruptionSpec
from occfeat_targets.cache.opening import open_cache
from occfeat_targets.cache.rebuild import rebuild_command
from occfeat_targets.cache.records import CacheError
from occfeat_targets.cache.spec import TargetSpec
from occfeat_targets.cache.store import Cache
from occfeat_targets.sources.keyframe import Keyframe
from occfeat_targets.targets.corruptions import corrupt, lost_cameras
from occfeat_targets.targets.images import load_image
from tests.targets.command_line import contents, run
from tests.targets.corrupted_caches import SPLIT, build_clean, make


@pytest.fixture(scope="module")
def clean(city: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean cache of 5 keyframes in 3 shards, without a teacher."""
    cache = tmp_path_factory.mktemp("clean")
    run(*build_clean(city, cache))
    return cache


@pytest.fixture
def cache(clean: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clean, tmp_path / "cache"))


def opened(cache: Path, folder: str) -> Cache:
    return open_cache(cache / folder / f"{SPLIT}.zarr")


def keyframes(cache: Path) -> list[Keyframe]:
    clean = open_cache(cache / f"{SPLIT}.zarr")
    plan = open_plan(clean, Path(clean.provenance["dataroot"]))
    return list(plan.find(clean, range(len(clean))).values())


def files(cache: Cache) -> dict[int, dict[str, str]]:
    """{shard: {file: SHA-256}}."""
    return {shard: record["files"] for shard, record in cache.finished_shards().items()}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_only_images_differ_from_the_clean_cache_and_verify_recomputes_them(cache, name):
    made = make(cache, name, 2)
    assert f"images corrupted: {name}, severity 2 (mid), at native size" in made.stdout
    folder = cache / "corruptions" / f"{name}-2"
    before, after = contents(cache, SPLIT), contents(folder, SPLIT)
    assert before.keys() == after.keys()
    assert (before["images"] != after["images"]).any()
    assert all((before[array] == after[array]).all() for array in before if array != "images")
    verified = run("verify", "--cache", folder, "--split", SPLIT, "--samples", "2", "--seed", "1", check=False)
    assert verified.returncode == 0, verified.stdout
    info = run("info", "--cache", folder, "--split", SPLIT).stdout
    assert f"images corrupted: {name}, severity 2 (mid)" in info
    assert f"everything but the images is that of {cache / SPLIT}.zarr" in info
    assert "SIMULATED: the data set is a synthetic city" in info


def test_verify_finds_images_of_another_severity(cache, monkeypatch):
    monkeypatch.setattr(
        "occfeat_targets.targets.corrupted_views.corrupt",
        lambda image, spec, file: corrupt(image, CorruptionSpec(spec.name, 1), file),
    )
    make(cache, "brightness", 2)
    verified = run(
        "verify", "--cache", cache / "corruptions/brightness-2", "--split", SPLIT, "--seed", "1", check=False
    )
    assert verified.returncode == 1
    assert "dB of full decoding" in verified.stdout


def test_array_tasks_and_a_build_that_continues_give_the_bytes_of_one_build(cache, tmp_path):
    other = Path(shutil.copytree(cache, tmp_path / "other"))
    make(cache, "snow", 1)
    where = ["--cache", other, "--split", SPLIT, "--corruption", "snow", "--severity", "1"]
    run("build", *where, "--plan-only")
    run("build", *where, "--shard", "1/2")
    assert list(opened(other, "corruptions/snow-1").finished_shards()) == [1]
    run("build", *where, "--workers", "0")
    assert files(opened(cache, "corruptions/snow-1")) == files(opened(other, "corruptions/snow-1"))
    again = make(cache, "snow", 1)
    assert "to build here: 0 shards" in again.stdout
    make(cache, "snow", 1, "--corruption-seed", "3")
    seeded = opened(cache, "corruptions-seed-3/snow-1")
    assert files(seeded)[0]["images/c/0/0/0/0/0"] != files(opened(cache, "corruptions/snow-1"))[0]["images/c/0/0/0/0/0"]
    make(cache, "snow", 1, "--overwrite")
    assert files(opened(cache, "corruptions/snow-1")) == files(opened(other, "corruptions/snow-1"))


def test_all_makes_every_corruption_and_announces_size_and_time(cache):
    made = run("build", "--cache", cache, "--split", SPLIT, "--corruption", "all", "--plan-only")
    there = {path.parent.name for path in (cache / "corruptions").glob(f"*/{SPLIT}.zarr")}
    assert there == {f"{name}-{severity}" for name in CORRUPTIONS for severity in SEVERITIES}
    size = 24 * 5 * opened(cache, "corruptions/fog-1").spec.bytes_per_keyframe / 1e6
    assert "24 corrupted caches of" in made.stdout
    assert f"24 of them not yet begun: {size:.3g} MB" in made.stdout
    assert "[24/24] images corrupted: frame-lost, severity 3 (hard)" in made.stdout
    one = run("build", "--cache", cache, "--split", SPLIT, "--workers", "0", "--corruption", "color-quant")
    assert "3 corrupted caches of" in one.stdout and ", 0 of them not yet begun" in one.stdout


def test_lost_views_are_black_and_the_others_go_through_a_jpeg(cache):
    make(cache, "frame-lost", 2)
    images = contents(cache / "corruptions" / "frame-lost-2", SPLIT)["images"]
    is_seen = contents(cache / "corruptions" / "frame-lost-2", SPLIT)["camera_valid"]
    spec, number = CorruptionSpec("frame-lost", 2), 0
    for i, keyframe in enumerate(keyframes(cache)):
        for j, lost in enumerate(lost_cameras(spec, [view.path for view in keyframe.cameras])):
            path, number = keyframe.cameras[j].path, number + lost
            (jpeg,) = load_image(path, [(96, 160)], corrupt=lambda image: image)
            assert (images[i, j] == (0 if lost else jpeg)).all()
    assert 0 < number < is_seen.size
    assert is_seen.all()


def test_mask_lost_masks_lost_cameras_unless_a_keyframe_has_lost_all(cache):
    def lost(seed: int) -> np.ndarray:
        spec = CorruptionSpec("frame-lost", 3, seed)
        return np.array([lost_cameras(spec, [view.path for view in k.cameras]) for k in keyframes(cache)])

    seed = next(seed for seed in range(1, 50) if 0 < lost(seed).all(axis=1).sum() < 5)
    expected = lost(seed)
    expected[expected.all(axis=1)] = False
    made = make(cache, "frame-lost", 3, "--mask-lost", "--corruption-seed", str(seed), check=False)
    assert made.returncode == 3, made.stderr
    folder = cache / f"corruptions-masked-seed-{seed}" / "frame-lost-3"
    found = contents(folder, SPLIT)
    assert (found["camera_valid"] == ~expected).all()
    assert found["is_valid"].all()
    assert "lists the reasons" in made.stdout and "--retry-skipped" not in made.stdout
    assert not found["images"][lost(seed)].any()
    assert not found["intrinsics"][expected].any() and found["intrinsics"][~expected].any()
    assert run("verify", "--cache", folder, "--split", SPLIT, "--seed", "2", "--samples", "5").returncode == 0
    assert "lost by frame-lost" in run("status", "--cache", folder, "--split", SPLIT, check=False).stdout


def test_network_protocol_corrupts_the_cached_image(cache):
    make(cache, "motion-blur", 1, "--corrupt-at", "network")
    folder = cache / "corruptions-network" / "motion-blur-1"
    before, after = contents(cache, SPLIT)["images"], contents(folder, SPLIT)["images"]
    spec = CorruptionSpec("motion-blur", 1, protocol="network")
    for i, keyframe in enumerate(keyframes(cache)):
        for j, view in enumerate(keyframe.cameras):
            assert (after[i, j] == corrupt(before[i, j], spec, view.path)).all()
    assert run("verify", "--cache", folder, "--split", SPLIT, "--seed", "2").returncode == 0


@pytest.mark.parametrize(
    ("name", "folder"), [("fog", "Fog/mid"), ("frame-lost", "FrameLost/mid"), ("frame-lost", "Frame/mid")]
)
def test_images_of_a_downloaded_nuscenes_c_are_read_in_both_folder_namings(cache, city, tmp_path, name, folder):
    """The tree of this test holds the images of the next camera, and black ones."""
    import cv2

    root, everything = tmp_path / "nuscenes-c", keyframes(cache)
    for keyframe in everything:
        for view, other in zip(keyframe.cameras, keyframe.cameras[1:] + keyframe.cameras[:1], strict=True):
            file = root / folder / view.path.parent.name / view.path.name
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(other.path, file)
    lost = root / folder / everything[0].cameras[2].path.parent.name / everything[0].cameras[2].path.name
    cv2.imwrite(str(lost), np.zeros((192, 320, 3), np.uint8))
    mask = ["--mask-lost"] * (name == "frame-lost")
    made = make(cache, name, 2, "--nuscenes-c", root, *mask, check=False)
    assert made.returncode == (3 if mask else 0), made.stderr
    made_in = cache / ("corruptions-downloaded-masked" if mask else "corruptions-downloaded") / f"{name}-2"
    before, after = contents(cache, SPLIT), contents(made_in, SPLIT)
    expected = np.roll(before["images"], -1, axis=1)
    expected[0, 2] = 0
    assert (after["images"] == expected).all()
    assert after["camera_valid"].sum() == before["camera_valid"].sum() - len(mask)
    assert run("verify", "--cache", made_in, "--split", SPLIT, "--seed", "2").returncode == 0
    info = run("info", "--cache", made_in, "--split", SPLIT).stdout
    assert "read from a downloaded nuScenes-C" in info and f"images of {root}" in info
    lost.unlink()
    failed = make(cache, name, 2, "--nuscenes-c", root, *mask, "--overwrite", check=False)
    assert failed.returncode == 1
    assert f"image {lost} is missing: --nuscenes-c must hold" in failed.stdout
    assert "failed; finished shards are intact. Fix the cause, and run" in failed.stdout
    assert "dataroot" not in failed.stdout and "--on-error" not in failed.stdout


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--corruption", "fog", "--grid", "8x100x100"], "--grid is that of the clean cache: leave it out"),
        (["--severity", "2"], "--severity is an option of --corruption"),
        (["--corruption", "fog", "--mask-lost"], "--mask-lost is for camera-crash and frame-lost"),
        (
            ["--corruption", "fog", "--nuscenes-c", "c", "--corrupt-at", "native"],
            "--corrupt-at is for images that are made",
        ),
        (["--corruption", "fog", "--nuscenes-c", "c"], "has no folder Fog/easy: expected the unpacked image folder"),
    ],
)
def test_options_that_do_not_fit_are_refused(cache, more, expected):
    refused = run("build", "--cache", cache, "--split", SPLIT, *more, check=False)
    assert refused.returncode in (1, 2)
    assert expected in refused.stderr
    assert not (cache / "corruptions").exists()


def test_all_downloaded_folders_are_looked_for_before_anything_is_built(cache, tmp_path):
    (tmp_path / "Brightness" / "mid").mkdir(parents=True)
    refused = make(cache, "all", 2, "--nuscenes-c", tmp_path, check=False)
    assert refused.returncode == 1 and "has no folder LowLight/mid: expected" in refused.stderr
    assert not (cache / "corruptions").exists()


def test_only_a_finished_clean_cache_is_corrupted(cache):
    (cache / f"{SPLIT}.zarr" / "progress" / "00001.json").unlink()
    assert "is not finished, 1 shard missing" in make(cache, "fog", 1, check=False).stderr
    assert "no cache at" in make(cache / "nothing", "fog", 1, check=False).stderr
    with pytest.raises(ValueError, match="a lost camera has no frame"):
        corrupted_spec(TargetSpec(frames=("ego", "CAM_FRONT")), CorruptionSpec("camera-crash", 1, masks_lost=True))


def test_a_cache_of_another_clean_cache_is_refused(cache, city):
    make(cache, "color-quant", 1)
    assert "holds corrupted images" in make(cache / "corruptions/color-quant-1", "fog", 1, check=False).stderr
    run(*build_clean(city, cache), "--overwrite")
    assert "was made from another clean cache" in make(cache, "color-quant", 1, check=False).stderr
    make(cache, "color-quant", 1, "--overwrite")


def test_a_corrupted_cache_of_another_format_is_refused_with_the_command_that_makes_it_again(tmp_path):
    path = tmp_path / "corruptions-network-masked-seed-2" / "frame-lost-3" / f"{SPLIT}.zarr"
    corruption = CorruptionSpec("frame-lost", 3, 2, "network", True)
    spec = {**TargetSpec(corruption=corruption).to_dict(), "format_version": 1}
    zarr.create_group(
        path, attributes={"occfeat": {"spec": spec, "keyframes_per_shard": 2, "provenance": {"split": SPLIT}}}
    )
    with pytest.raises(CacheError) as refused:
        open_cache(path)
    *_, command = str(refused.value).splitlines()
    words = shlex.split(command)
    given = build.make_context("build", words[2:]).params
    again = CorruptionSpec(
        given["corruption"], given["severity"], given["corruption_seed"], given["corrupt_at"], given["mask_lost"]
    )
    assert (
        given["cache"] / again.folder / f"{given['split']}.zarr" == path and again == corruption and given["overwrite"]
    )
    downloaded = {**spec, "corruption": asdict(CorruptionSpec("fog", 1, protocol="downloaded"))}
    command = rebuild_command(path, {"spec": downloaded, "provenance": {"split": SPLIT, "nuscenes_c": "/data/c"}})
    assert command.endswith("--corruption fog --severity 1 --nuscenes-c /data/c")

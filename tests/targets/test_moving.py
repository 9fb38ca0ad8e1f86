"""Moving objects in accumulated sweeps: closed forms of each treatment, poses of boxes, and caches of a city with traffic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyquaternion import Quaternion

from occfeat_targets.cache.geometry import rigid
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.cache.spec import BOXES_NOTE, CAMERAS, TargetSpec
from occfeat_targets.sources.keyframe import DatasetError, Keyframe, Sweep, Track
from occfeat_targets.sources.keyframe_files import keyframes_from_bytes, keyframes_to_bytes
from occfeat_targets.sources.nuscenes import read_split
from occfeat_targets.targets.lidar import lidar_arrays
from occfeat_targets.targets.moving import box_pose, move_returns
from occfeat_targets.verify.slow_nuscenes import read_keyframes
from occfeat_train.config import Config
from occfeat_train.data.dataset import KeyframeDataset
from occfeat_train.presets import OCC_ONLY
from occfeat_train.training.compatibility import notes_on_data
from tests.targets.command_line import build_arguments, contents, run
from tests.targets.test_keyframe_files import assert_equal
from tests.targets.toy_source import build

GRID = VoxelGrid((2, 20, 20), (-1, -10, -10), (1, 10, 10))  # cells of 1 m
SPEC = TargetSpec(grid=GRID, labels=(), num_sweeps=2, dynamic="carve", ego_box=0.0)
AT = 0.5  # the middle of a cell


def returns_at(*cells: tuple[int, int]) -> np.ndarray:
    """Returns in the middle of cells (right, forward) of the upper layer, from a sensor at the origin of the grid."""
    return np.array([(right + AT, forward + AT, AT, 0) for right, forward in cells], np.float32)


def occupied(dynamic: str, *sweeps: np.ndarray, tracks: tuple[Track, ...] = ()) -> set[tuple[int, int]]:
    """Occupied cells (right, forward) for a sensor 0.1 m above the origin, in the middle of a cell; the grid is the ego frame."""
    pose = np.eye(4)
    pose[:3, 3] = AT, AT, 0.1
    keyframe = Keyframe(
        "token",
        "scene",
        0,
        "town",
        sweeps=tuple(Sweep(Path("sweep"), pose, -0.25 * i) for i in range(len(sweeps))),
        tracks=tracks,
    )
    spec = replace(SPEC, dynamic=dynamic, num_sweeps=max(len(sweeps), 2))
    local = [np.concatenate([values[:, :3] - pose[:3, 3], values[:, 3:]], 1).astype(np.float32) for values in sweeps]
    volume = GRID.unpack_volume(lidar_arrays(keyframe, local, spec, np.eye(4)[None])["occupancy"][0])
    return {(int(w) - 10, int(h) - 10) for _, h, w in np.argwhere(volume)}


# -- carve and smear --------------------------------------------------------------------------------------------------


def test_carving_empties_voxels_that_the_own_sweep_sees_through() -> None:
    wall, gone = returns_at((0, 8)), returns_at((0, 4))
    assert occupied("smear", wall, gone) == {(0, 8), (0, 4)}
    assert occupied("carve", wall, gone) == {(0, 8)}


def test_carving_keeps_what_the_own_sweep_does_not_see() -> None:
    wall, behind_and_beside = returns_at((0, 5)), returns_at((0, 8), (4, 4))
    assert occupied("carve", wall, behind_and_beside) == {(0, 5), (0, 8), (4, 4)}


def test_carving_keeps_the_own_returns_where_other_own_rays_pass() -> None:
    """A fence: one ray ends in it, another one passes through."""
    fence = np.array([(AT, 4.5, 0.4, 0), (AT, 8.5, 0.6, 0)], np.float32)
    assert occupied("carve", fence, returns_at((0, 4), (0, 6))) == {(0, 4), (0, 8)}


@pytest.mark.parametrize("dynamic", ["carve", "boxes", "smear"])
def test_a_first_keyframe_without_earlier_sweeps_is_the_same_for_every_treatment(dynamic: str) -> None:
    cells = {(0, 8), (0, 4), (3, -2)}
    assert occupied(dynamic, returns_at(*cells)) == cells


# -- boxes ------------------------------------------------------------------------------------------------------------


def track(before: tuple[float, float], now: tuple[float, float], turn: float = 0.0) -> Track:
    """A box of 2x2x2 m that moves from `before` (right, forward) at -0.5 s, turning by `turn` about the vertical [rad]."""
    rotations = np.array([(np.cos(turn / 2), 0, 0, np.sin(turn / 2)), (1, 0, 0, 0)])
    return Track(np.ones(3), np.array([0, -0.5]), rotations, np.array([(*now, AT), (*before, AT)]))


def test_returns_in_a_box_move_with_it_and_others_stay() -> None:
    moving = track((AT, 0.5), (AT, 8.5))  # at -0.25 s in the middle, at (0.5, 4.5)
    own, earlier = returns_at((5, 5)), returns_at((0, 4), (1, 5), (0, 7))
    earlier[1, :2] = 1.4, 5.4  # 0.9 m from the centre
    assert occupied("boxes", own, earlier, tracks=(moving,)) == {(5, 5), (0, 8), (1, 9), (0, 7)}
    assert occupied("smear", own, earlier, tracks=(moving,)) == {(5, 5), (0, 4), (1, 5), (0, 7)}


def test_returns_turn_with_their_box() -> None:
    turning = track((AT, AT), (AT, AT), turn=np.pi)  # by 90 degrees from -0.25 s to 0
    assert occupied("boxes", returns_at((5, 5)), np.array([(1.3, AT, AT, 0)], np.float32), tracks=(turning,)) == {
        (5, 5),
        (0, 1),
    }


def test_returns_of_the_own_sweep_do_not_move() -> None:
    moving = track((AT, 0.5), (AT, 8.5))
    assert occupied("boxes", returns_at((0, 8), (0, 4)), returns_at((5, 5)), tracks=(moving,)) == {
        (0, 8),
        (0, 4),
        (5, 5),
    }


def test_an_object_that_was_not_annotated_before_the_sweep_does_not_move() -> None:
    late = replace(track((AT, 0.5), (AT, 8.5)), seconds=np.array([0, -0.1]))
    assert box_pose(late, -0.25) is None
    assert occupied("boxes", returns_at((5, 5)), returns_at((0, 4)), tracks=(late,)) == {(5, 5), (0, 4)}


def test_a_return_in_two_boxes_moves_with_the_first() -> None:
    first, second = track((AT, 4.5), (4.5, 4.5)), track((AT, 4.5), (AT, 8.5))
    keyframe = Keyframe(
        "t", "s", 0, "town", sweeps=(Sweep(Path(), np.eye(4)), Sweep(Path(), np.eye(4), -0.5)), tracks=(first, second)
    )
    is_moved, moved = move_returns(returns_at((0, 4), (0, 8)), keyframe, 1)
    assert is_moved.tolist() == [True, False]
    np.testing.assert_allclose(moved, [[4.5, 4.5, AT]], atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-1.6, 0.2))
def test_poses_between_annotations_are_those_of_pyquaternion(seed: int, seconds: float) -> None:
    rng = np.random.default_rng(seed)
    box = Track(np.ones(3), np.array([0, -0.5, -1, -1.5]), rng.normal(size=(4, 4)), rng.normal(size=(4, 3)))
    found = box_pose(box, seconds)
    if not -1.5 <= seconds <= 0:
        assert found is None
        return
    i = min(int(-seconds / 0.5), 2)
    share = (box.seconds[i] - seconds) / 0.5
    rotation = Quaternion.slerp(Quaternion(box.rotations[i]), Quaternion(box.rotations[i + 1]), share)
    expected = rigid(rotation.elements, (1 - share) * box.translations[i] + share * box.translations[i + 1])
    assert found is not None
    np.testing.assert_allclose(found, expected, atol=1e-7)


# -- options ----------------------------------------------------------------------------------------------------------


def test_earlier_sweeps_are_carved_by_default(toy: Path, tmp_path: Path) -> None:
    built = build(toy, tmp_path / "default", "none", "--sweeps", "2")
    assert "sweeps per keyframe: 2, moving objects: carve" in built.stdout
    assert CacheReader(tmp_path / "default" / "all.zarr").cache.spec.dynamic == "carve"
    refused = build(toy, tmp_path / "default", "none", "--sweeps", "2", "--dynamic", "smear", check=False)
    assert refused.returncode == 1 and "dynamic: carve != smear" in refused.stderr


def test_with_one_sweep_nothing_changes_and_a_treatment_is_refused(toy: Path, tmp_path: Path) -> None:
    build(toy, tmp_path / "one", "none")
    build(toy, tmp_path / "smear", "none", "--dynamic", "smear")
    one, smear = (CacheReader(tmp_path / name / "all.zarr").cache.spec for name in ("one", "smear"))
    assert one == smear and one.fingerprint == smear.fingerprint and one.dynamic == "smear"
    for dynamic in ("carve", "boxes"):
        refused = build(toy, tmp_path / "other", "none", "--dynamic", dynamic, check=False)
        assert refused.returncode == 1 and f"--dynamic {dynamic} is about earlier sweeps" in refused.stderr


def test_boxes_of_a_source_without_tracks_are_refused(toy: Path, tmp_path: Path) -> None:
    refused = build(toy, tmp_path, "none", "--sweeps", "2", "--dynamic", "boxes", check=False)
    assert refused.returncode == 1
    assert "--source toy has no tracks of objects, which --dynamic boxes needs: pass --dynamic carve" in refused.stderr


def test_boxes_of_a_data_set_without_annotations_are_refused(changed) -> None:
    root = changed("sample_annotation", lambda records: records.clear())
    with pytest.raises(DatasetError, match="no annotations, which --dynamic boxes needs: pass --dynamic carve"):
        read_split(root, "mini_train", version=None, cameras=CAMERAS, num_sweeps=3, with_boxes=False, with_tracks=True)


# -- the city, which has traffic --------------------------------------------------------------------------------------


def test_tracks_are_those_of_an_independent_reader_and_survive_files(city: Path) -> None:
    split = read_split(
        city, "mini_train", version=None, cameras=CAMERAS, num_sweeps=3, with_boxes=True, with_tracks=True
    )
    slow = read_keyframes(city, "v1.0-mini", [k.token for k in split.keyframes], CAMERAS, 3, with_tracks=True)
    assert sum(len(keyframe.tracks) for keyframe in split.keyframes) > 50
    moves = []
    for keyframe in split.keyframes:
        expected = slow[keyframe.token].tracks
        assert len(keyframe.tracks) == len(expected)
        order = [sorted(tracks, key=lambda t: t.translations[0].tolist()) for tracks in (keyframe.tracks, expected)]
        for ours, theirs in zip(*order, strict=True):
            assert ours.seconds[0] == 0 and len(ours.seconds) == 2  # three sweeps do not reach back further
            moves.append(float(np.linalg.norm(np.diff(ours.translations, axis=0))))
            for name, value in vars(ours).items():
                np.testing.assert_allclose(value, vars(theirs)[name], atol=1e-9)
    assert max(moves) > 2
    content = keyframes_to_bytes(split.keyframes, split.dataroot)
    for before, after in zip(split.keyframes, keyframes_from_bytes(content, split.dataroot), strict=True):
        assert_equal(before, after)
    without = read_split(city, "mini_train", version=None, cameras=CAMERAS, num_sweeps=3, with_boxes=True)
    assert b"tracks" not in keyframes_to_bytes(without.keyframes, without.dataroot)


@pytest.fixture(scope="module")
def accumulated(city: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Caches of three sweeps, one for each treatment."""
    folder = tmp_path_factory.mktemp("accumulated")
    for dynamic in ("carve", "boxes", "smear"):
        more = ("--sweeps", "3", "--dynamic", dynamic, "--rays", "--frames", "both", "--workers", "0")
        run(*build_arguments(city, folder / dynamic, "none", *more))
    return {dynamic: folder / dynamic for dynamic in ("carve", "boxes", "smear")}


@pytest.mark.parametrize("dynamic", ["carve", "boxes", "smear"])
def test_verify_recomputes_every_treatment(accumulated: dict[str, Path], dynamic: str) -> None:
    result = run(
        "verify", "--cache", accumulated[dynamic], "--split", "mini_train", "--samples", "2", "--tables", "--seed", "1"
    )
    assert result.stdout.count(" 0 voxels wrong") == 2
    assert result.stdout.count(" 0 bits of rays wrong") == 2


def test_verify_finds_another_treatment(accumulated: dict[str, Path], city: Path, tmp_path: Path, monkeypatch) -> None:
    def smeared(keyframe, returns, spec, frames):
        return lidar_arrays(keyframe, returns, replace(spec, dynamic="smear"), frames)

    monkeypatch.setattr("occfeat_targets.build.assemble.lidar_arrays", smeared)
    for dynamic in ("carve", "boxes"):
        run(*build_arguments(city, tmp_path / dynamic, "none", "--sweeps", "3", "--dynamic", dynamic, "--workers", "0"))
        result = run(
            "verify",
            "--cache",
            tmp_path / dynamic,
            "--split",
            "mini_train",
            "--samples",
            "2",
            "--seed",
            "1",
            check=False,
        )
        assert result.returncode == 1, dynamic


def test_carving_occupies_a_part_of_what_smearing_does_and_only_boxes_say_that_they_use_labels(
    accumulated: dict[str, Path],
) -> None:
    bits = {name: np.unpackbits(contents(cache)["occupancy"], axis=-1) for name, cache in accumulated.items()}
    assert (bits["carve"] <= bits["smear"]).all()
    assert bits["carve"].sum() < bits["smear"].sum() and (bits["boxes"] != bits["smear"]).any()
    for name, cache in accumulated.items():
        info = run("info", "--cache", cache, "--split", "mini_train").stdout
        assert f"moving objects: {name}" in info
        assert (BOXES_NOTE in info) == (name == "boxes")
        config = Config(loss=OCC_ONLY, allow_upsampling=True, frame="ego")
        dataset = KeyframeDataset(CacheReader(cache / "mini_train.zarr"), config, training=True)
        assert any(BOXES_NOTE in line for line in notes_on_data(dataset)) == (name == "boxes")

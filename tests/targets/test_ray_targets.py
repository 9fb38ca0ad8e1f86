"""Ray targets in a cache: what is stored, verified and drawn, with masked cameras, skipped keyframes and several sweeps."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.cache.records import CacheError
from occfeat_targets.cache.spec import TargetSpec
from occfeat_targets.pictures.sheet import Scene, draw_keyframe
from occfeat_targets.targets.lidar import lidar_arrays
from occfeat_targets.targets.rays import walk_rays
from tests.targets.command_line import contents, run
from tests.targets.toy_source import WHERE, build, ego_from_lidar, returns


@pytest.fixture
def rays(toy: Path, tmp_path: Path) -> CacheReader:
    build(toy, tmp_path / "rays", "none", "--rays", "--sweeps", "2", "--points", "--dynamic", "smear")
    return CacheReader(tmp_path / "rays" / "all.zarr")


def volumes(reader: CacheReader, keyframe: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(F, Z, H, W) occupied, observed and free."""
    unpack = reader.cache.spec.grid.unpack_volume
    observed, free = unpack(reader.read("rays", keyframe)).swapaxes(0, 1)
    return unpack(reader.read("occupancy", keyframe)), observed, free


def test_every_voxel_is_occupied_free_or_unknown(rays: CacheReader) -> None:
    occupied, observed, free = volumes(rays)
    np.testing.assert_array_equal(occupied.astype(int) + free + ~observed, 1)
    assert occupied.any() and free.any() and not observed.all()


def test_the_rays_are_those_of_all_sweeps_from_their_own_origins(rays: CacheReader) -> None:
    spec, grids_from_ego = rays.cache.spec, rays.read("grid_from_ego", 0).astype(np.float64)
    occupied, _, free = volumes(rays)
    passed = [walk_rays(returns(), grids_from_ego @ ego_from_lidar(i), spec.grid, ego_box=2.15) for i in range(2)]
    both, first = (spec.grid.unpack_volume(packed) for packed in (passed[0] | passed[1], passed[0]))
    np.testing.assert_array_equal(free, both & ~occupied)
    assert (free != first & ~occupied).any()
    origins = (grids_from_ego @ ego_from_lidar(0))[:, :3, 3]
    np.testing.assert_allclose(rays.read("ray_origin", 0), origins, atol=1e-6)


def test_rays_change_no_other_array(toy: Path, rays: CacheReader, tmp_path: Path) -> None:
    build(toy, tmp_path / "plain", "none", "--sweeps", "2", "--points", "--dynamic", "smear")
    plain, found = contents(tmp_path / "plain", "all"), contents(rays.cache.path.parent, "all")
    assert found.keys() - plain.keys() == {"rays", "ray_origin"}
    for name, values in plain.items():
        np.testing.assert_array_equal(found[name], values)
    with pytest.raises(CacheError, match="has no array 'rays'"):
        CacheReader(tmp_path / "plain" / "all.zarr").read("rays", 0)


def test_masked_cameras_and_skipped_keyframes_have_no_rays(toy: Path, tmp_path: Path) -> None:
    (toy / "tall" / "1.jpg").unlink()
    (toy / "front" / "3.jpg").unlink()  # this is also its sweep
    build(toy, tmp_path, "none", "--rays", "--on-error", "mask-camera", check=False)
    reader = CacheReader(tmp_path / "all.zarr")
    tall = 1 + 1  # after the ego frame
    filled = {number: reader.read("rays", number).any(axis=(1, 2)).tolist() for number in (0, 1, 3)}
    assert filled == {0: [True] * 4, 1: [frame != tall for frame in range(4)], 3: [False] * 4}
    assert not reader.read("ray_origin", 1)[tall].any() and reader.read("ray_origin", 1)[0].any()
    assert run("verify", *WHERE, tmp_path, "--samples", "9").stdout.count(" 0 bits of rays wrong") == 3
    run("preview", *WHERE, tmp_path, "--out", tmp_path / "preview", "--frame", "tall")


@pytest.mark.parametrize("fault", ["a lost ray", "an added ray", "unobserved free voxels", "another origin"])
def test_verify_finds_wrong_rays(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def wrong(*arguments, **options):
        arrays = lidar_arrays(*arguments, **options)
        rays = arrays["rays"]
        if fault == "a lost ray":
            first = np.argwhere(rays[0, 1])[0]
            rays[0, :, first] = 0
        elif fault == "an added ray":
            rays[1] |= ~rays[1] & ~arrays["occupancy"][1] & 16
        elif fault == "unobserved free voxels":
            rays[:, 0] &= ~rays[:, 1]
        else:
            arrays["ray_origin"] += 0.01
        return arrays

    monkeypatch.setattr("occfeat_targets.build.assemble.lidar_arrays", wrong)
    build(toy, tmp_path, "none", "--rays")
    result = run("verify", *WHERE, tmp_path, "--samples", "1", check=False)
    assert result.returncode == 1
    assert re.search(r"free voxels, \d+ bits of rays wrong, their origin within", result.stdout)


def test_the_preview_shows_what_the_rays_observed(rays: CacheReader, toy: Path, tmp_path: Path) -> None:
    build(toy, tmp_path / "plain", "none")
    plain = Scene(CacheReader(tmp_path / "plain" / "all.zarr"), 0, 0)
    assert len(plain.panels()) == 1
    _, panel = Scene(rays, 0, 0).panels()
    _, observed, free = volumes(rays)
    assert panel.title == f"{100 * observed[0].mean():.1f} % of the voxels are observed by the LiDAR's rays"
    colors = {tuple(color) for color in panel.colors.reshape(-1, 3).tolist()}
    assert len(colors) == 3
    assert (panel.colors[free[0].any(0) & ~(observed & ~free)[0].any(0)] == (140, 150, 210)).all()
    assert draw_keyframe(rays, 0).axes


def test_more_than_three_panels_are_drawn_in_rows(rays: CacheReader, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(rays, 0, 0)
    panels = scene.panels() * 2
    monkeypatch.setattr(scene, "panels", lambda: panels)
    assert len(scene.maps()) == 2


def test_a_cache_with_rays_says_so_and_announces_their_size(rays: CacheReader) -> None:
    out = run("info", *WHERE, rays.cache.path.parent).stdout
    assert "rays: which voxels the LiDAR's rays have passed (observed, free)" in out
    spec = TargetSpec(rays=True)
    more = spec.bytes_per_keyframe - TargetSpec().bytes_per_keyframe
    assert 8_000 < more < 13_000  # a nuScenes keyframe takes 10 to 12 kB

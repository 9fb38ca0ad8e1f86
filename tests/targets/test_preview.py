import re

import numpy as np
import pytest
from PIL import Image

from occfeat_targets.cache.geometry import GRID_FROM_EGO_AXES, inverse_rigid, project, transform
from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.cache.spec import CAMERAS
from occfeat_targets.cache.store import create_cache
from occfeat_targets.pictures.birdseye import (
    occupied_at_body_height,
)
from occfeat_targets.pictures.colors import ALARM, INK, ColorScale
from occfeat_targets.pictures.page import choose_keyframes, fit_features, read_returns, write_preview
from occfeat_targets.pictures.sheet import GAP, MARGIN, TILE_WIDTH, Layout, draw_keyframe, read_features, why_absent
from tests.conftest import SMALL_GRID, random_arrays, small_identity, small_spec
from tests.targets.command_line import run

GREY = (100, 100, 100)
SCALE = ColorScale("", SMALL_GRID.lower[0], SMALL_GRID.upper[0])
INTRINSICS = np.array([[20, 0, 12], [0, 20, 8], [0, 0, 1]], np.float32)
YAWS = np.deg2rad([60, 0, -60, 120, 180, -120])  # of CAMERAS, to the left of the ego's x axis


def cam_from_ego(yaw):
    """Cameras at the ego's origin that look along `yaw` in its plane."""
    x = (np.sin(yaw), -np.cos(yaw), 0)  # right
    z = (np.cos(yaw), np.sin(yaw), 0)
    matrix = np.eye(4)
    matrix[:3, :3] = [x, (0, 0, -1), z]
    return matrix


def make_cache(tmp_path, occupied=(), *, spec=None, simulated=(), skipped=(), **contents):
    """A cache of grey images and known calibration whose every keyframe has the same voxels (z, h, w) occupied."""
    spec = spec or small_spec(teacher=None)
    provenance = {"simulated": list(simulated)}
    cache = create_cache(tmp_path / "train.zarr", spec, small_identity(3), keyframes_per_shard=3, provenance=provenance)
    volume = np.zeros(SMALL_GRID.shape, np.bool_)
    for index in occupied:
        volume[index] = True
    arrays = {a.name: np.zeros((3, *a.shape), a.dtype) for a in spec.arrays()}
    arrays["is_valid"][:] = [i not in skipped for i in range(3)]
    arrays["images"][:] = GREY
    arrays["intrinsics"][:] = INTRINSICS
    arrays["cam_from_ego"][:] = [cam_from_ego(yaw) for yaw in YAWS]
    arrays["grid_from_ego"][:] = GRID_FROM_EGO_AXES
    arrays["occupancy"][:] = SMALL_GRID.pack_volume(volume)
    if "vehicles" in spec.labels:
        arrays["labels/vehicles_valid"][:] = 255
    for name, values in contents.items():
        arrays[name][:] = values
    tokens = cache.identity.tokens
    cache.write_shard(0, arrays, {"skipped": {tokens[i]: f"no JPEG for {tokens[i]}" for i in skipped}, "cosine": None})
    return CacheReader(cache)


def pixels_of(image, color):
    """(n, 2) x, y of the pixels of exactly this colour."""
    return np.argwhere((np.asarray(image) == color).all(axis=-1))[:, ::-1]


def size(file):
    with Image.open(file) as image:
        return image.size


def layout_of(reader, sheet):
    kinds = ("voxels", "features") if reader.cache.spec.teacher else ("voxels",)
    first_image_row = pixels_of(sheet.crop((MARGIN + TILE_WIDTH - 1, 0, MARGIN + TILE_WIDTH, sheet.height)), GREY)[0, 1]
    return Layout(reader.cache.spec, kinds, int(first_image_row))


def tile(sheet, layout, camera, kind="voxels"):
    x, y = layout.corner(camera, kind)
    width, height = layout.tile
    return sheet.crop((x, y, x + width, y + height))


@pytest.mark.parametrize("camera", range(6))
def test_a_voxel_is_drawn_where_its_centre_projects_and_on_no_other_camera(tmp_path, camera):
    centers = SMALL_GRID.voxel_centers()
    ego = transform(inverse_rigid(GRID_FROM_EGO_AXES), centers)
    pixels, depth, is_valid = project(INTRINSICS, transform(cam_from_ego(YAWS[camera]), ego), (16, 24))
    inside = is_valid & (depth > 2) & (abs(pixels - (12, 9)) < (4, 3)).all(axis=-1)
    index = tuple(np.argwhere(inside)[len(np.argwhere(inside)) // 2])
    reader = make_cache(tmp_path, [index])
    sheet = draw_keyframe(reader, 1)
    layout, color = layout_of(reader, sheet), SCALE.colors(centers[index][2])
    expected = pixels[index] * TILE_WIDTH / 24
    assert tile(sheet, layout, camera).getpixel(tuple(expected.astype(int).tolist())) == tuple(color)
    found = pixels_of(tile(sheet, layout, camera), color) + 0.5
    np.testing.assert_allclose(found.mean(axis=0), expected, atol=0.6)
    assert np.ptp(found, axis=0).max() <= 13
    others = [len(pixels_of(tile(sheet, layout, other), color)) for other in range(6) if other != camera]
    assert others == [0] * 5


def test_cameras_lie_on_the_sheet_as_on_the_car():
    layout = Layout(small_spec(), ("voxels", "features"), 100)
    corners = {name: layout.corner(i, "voxels") for i, name in enumerate(CAMERAS)}
    columns, rows = zip(*corners.values(), strict=True)
    assert list(columns) == [MARGIN, MARGIN + TILE_WIDTH + GAP, MARGIN + 2 * (TILE_WIDTH + GAP)] * 2
    assert corners["CAM_FRONT_LEFT"][1] == corners["CAM_FRONT_RIGHT"][1] == 100
    assert corners["CAM_BACK"][0] == corners["CAM_FRONT"][0]
    assert rows[3] == 100 + 2 * (layout.tile[1] + GAP)
    assert layout.corner(0, "features") == (MARGIN, 100 + layout.tile[1] + GAP)


def test_cameras_keep_their_places_when_a_spec_names_fewer_or_orders_them_otherwise():
    names = ("CAM_BACK", "CAM_FRONT")
    layout = Layout(small_spec(cameras=names), ("voxels",), 0)
    assert layout.corner(0, "voxels") > layout.corner(1, "voxels")
    assert layout.corner(0, "voxels")[0] == layout.corner(1, "voxels")[0] == MARGIN + TILE_WIDTH + GAP
    assert Layout(small_spec(cameras=("left", "right")), ("voxels",), 0).corner(1, "voxels")[1] == 0


def test_a_forward_voxel_is_above_the_ego_and_one_on_the_right_is_right_of_it(tmp_path):
    z, h, w = 3, 10, 6  # the cells just forward and right of the origin
    ahead, right = (z, h + 8, w), (z - 3, h, w + 5)
    reader = make_cache(tmp_path, [ahead, right])
    sheet = draw_keyframe(reader, 0)
    below = layout_of(reader, sheet).bottom
    panel = sheet.crop((0, below + 28, TILE_WIDTH, sheet.height))
    ego = pixels_of(panel, INK)
    at_ahead, at_right = (
        pixels_of(panel, SCALE.colors(SMALL_GRID.voxel_centers()[index][2])).mean(axis=0) for index in (ahead, right)
    )
    assert at_ahead[1] < ego[:, 1].min() - 20
    assert at_right[0] > ego[:, 0].max() + 20
    assert abs(at_right[1] - at_ahead[1] - 8 * 30) < 3  # 8 cells of 1 m, 600 px for 20 m
    assert abs(at_right[0] - at_ahead[0] - 5 * 30) < 3


def test_the_same_feature_has_the_same_colour_in_every_view_and_keyframe(tmp_path):
    spec = small_spec()
    features = np.zeros((3, *next(a.shape for a in spec.arrays() if a.name == "features")), np.float16)
    rng = np.random.default_rng(0)
    features[...] = rng.normal(size=features.shape)
    features[:, :, 0, 2] = rng.normal(size=8)
    reader = make_cache(tmp_path / "made", spec=spec, features=features)
    shared = fit_features(reader, [0, 1, 2])
    corners = set()
    for keyframe in range(3):
        sheet = draw_keyframe(reader, keyframe, feature_colors=shared)
        layout = layout_of(reader, sheet)
        for camera in range(6):
            picture = tile(sheet, layout, camera, "features")
            corners.add(picture.getpixel((TILE_WIDTH - 3, 30)))
            np.testing.assert_array_equal(
                picture.getpixel((TILE_WIDTH // 2, layout.tile[1] - 3)), shared(features[keyframe, camera, 1, 1])
            )
    assert len(corners) == 1


def test_int8_features_are_multiplied_by_their_scale(tmp_path):
    spec = small_spec(feature_dtype="int8")
    scale = np.arange(36, dtype=np.float16).reshape(6, 2, 3)
    reader = make_cache(tmp_path, spec=spec, features=np.int8(-3), feature_scale=scale)
    np.testing.assert_array_equal(read_features(reader, 0), np.broadcast_to(-3.0 * scale[..., None], (6, 2, 3, 8)))


def test_simulated_data_carries_a_banner_and_real_data_none(tmp_path):
    real = draw_keyframe(make_cache(tmp_path / "real"), 0)
    simulated = draw_keyframe(make_cache(tmp_path / "simulated", simulated=["the city is synthetic"]), 0)
    assert len(pixels_of(real, ALARM)) == 0
    assert len(pixels_of(simulated, ALARM)) > 30 * simulated.width
    assert simulated.height > real.height


def test_a_skipped_keyframe_is_never_drawn_as_a_picture_of_zeros(tmp_path):
    reader = make_cache(tmp_path, [(3, 18, 6)], skipped=[1])
    assert why_absent(reader, 0) is None
    assert why_absent(reader, 1) == ("SKIPPED: this keyframe has no targets", "no JPEG for token1")
    good, skipped = draw_keyframe(reader, 0), draw_keyframe(reader, 1)
    assert skipped.height < good.height / 2
    assert len(pixels_of(skipped, GREY)) == 0
    assert len(pixels_of(skipped.crop((0, 100, skipped.width, skipped.height)), INK)) > 5000  # letters of 72 px
    assert write_preview(reader.cache, tmp_path / "out", [1], points=True, progress=False).is_file()


def test_a_keyframe_that_is_not_built_yet_is_named_so(small_cache, tmp_path):
    with pytest.raises(ValueError, match="nothing of .* is built yet"):
        choose_keyframes(small_cache)
    small_cache.write_shard(0, random_arrays(small_cache, 0), {"skipped": {}, "cosine": None})
    assert choose_keyframes(small_cache) == [0, 1, 2]
    reader = CacheReader(small_cache, allow_incomplete=True)
    assert why_absent(reader, 3)[0] == "NOT BUILT YET"
    assert len(pixels_of(draw_keyframe(reader, 3), INK)) > 2000
    assert write_preview(small_cache, tmp_path / "out", [2, 3], progress=False).is_file()


def test_the_page_shows_every_sheet_and_says_what_is_simulated(finished_cache, tmp_path):
    simulated = make_cache(tmp_path / "a", simulated=["the teacher's <weights> are random"])
    page = write_preview(simulated.cache, tmp_path / "out", [0, 2], progress=False)
    text = page.read_text()
    names = sorted(p.name for p in page.parent.glob("*.png"))
    assert names == ["keyframe-000000.png", "keyframe-000002.png"]
    assert all(text.count(f'src="{name}"') == 1 for name in names)
    assert not re.search(r"<script|<link|https?://|src=\"(?!keyframe-)", text)
    assert "SIMULATED: the teacher&#39;s &lt;weights&gt; are random" in text
    assert "token2" in text
    assert simulated.cache.spec.fingerprint in text
    assert size(page.parent / names[1])[0] == 1920
    assert "SIMULATED" not in write_preview(finished_cache, tmp_path / "real", [0], progress=False).read_text()


def test_keyframes_are_chosen_by_number_token_or_evenly(finished_cache):
    assert choose_keyframes(finished_cache) == [0, 2, 4, 6]
    assert choose_keyframes(finished_cache, samples=99) == list(range(7))
    assert choose_keyframes(finished_cache, samples=1) == [0]
    assert choose_keyframes(finished_cache, numbers="5, 0", tokens=["token3", "token5"]) == [5, 0, 3]
    with pytest.raises(ValueError, match="numbers joined by commas"):
        choose_keyframes(finished_cache, numbers="1;2")
    with pytest.raises(ValueError, match="no keyframe 7: it has 7"):
        choose_keyframes(finished_cache, numbers="7")
    with pytest.raises(ValueError, match="no sample 'nobody'"):
        choose_keyframes(finished_cache, tokens=["nobody"])


def test_what_a_cache_lacks_is_refused_with_what_it_has(finished_cache, tmp_path):
    reader = CacheReader(finished_cache)
    with pytest.raises(ValueError, match="no grid in frame 'CAM_FRONT': choose one of ego"):
        draw_keyframe(reader, 0, frame="CAM_FRONT")
    with pytest.raises(IndexError, match="keyframe 7 of a cache of 7"):
        draw_keyframe(reader, 7)
    with pytest.raises(ValueError, match="no keyframe 9"):
        write_preview(finished_cache, tmp_path / "out", [9])
    with pytest.raises(ValueError, match="no data set at None: pass --dataroot, or leave --points out"):
        write_preview(finished_cache, tmp_path / "out", [0], points=True)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="could not write"):
        write_preview(finished_cache, tmp_path / "file" / "out", [0])
    with pytest.raises(ValueError, match="nowhere"):
        read_returns(finished_cache, [0], tmp_path / "nowhere")


@pytest.mark.parametrize("labels", [(), ("map",), ("vehicles",)])
def test_panels_are_drawn_for_the_labels_there_are(tmp_path, labels):
    reader = make_cache(tmp_path, [(3, 18, 6)], spec=small_spec(teacher=None, labels=labels))
    sheet = draw_keyframe(reader, 0)
    below = layout_of(reader, sheet).bottom + 60
    used = [
        bool(
            len(
                pixels_of(sheet.crop((MARGIN + i * (TILE_WIDTH + GAP), below, (i + 1) * TILE_WIDTH, sheet.height)), INK)
            )
        )
        for i in range(3)
    ]
    assert used == [True, bool(labels), "vehicles" in labels]


def test_the_command_writes_a_page_and_takes_every_option(city, serial, tmp_path):
    where = ["--cache", serial, "--split", "mini_train"]
    out = run("preview", *where, "--out", tmp_path / "a", "--samples", "2", "--frame", "CAM_BACK").stdout
    assert str(tmp_path / "a" / "index.html") in out
    assert len(list((tmp_path / "a").glob("*.png"))) == 2
    token = CacheReader(serial / "mini_train.zarr").cache.identity.tokens[4]
    run("preview", *where, "--out", tmp_path / "b", "--keyframes", "1", "--token", token)
    assert [p.name for p in sorted((tmp_path / "b").glob("*.png"))] == ["keyframe-000001.png", "keyframe-000004.png"]
    run("preview", *where, "--out", tmp_path / "c", "--keyframes", "1", "--points", "--dataroot", city)
    heights = [size(tmp_path / folder / "keyframe-000001.png")[1] for folder in "bc"]
    assert heights[1] > heights[0] + 300
    refused = run("preview", *where, "--out", tmp_path / "d", "--frame", "moon", check=False)
    assert refused.returncode == 1
    assert "choose one of ego, CAM_FRONT_LEFT" in refused.stderr


def assert_every_return_lies_in_an_occupied_voxel(cache_path):
    reader = CacheReader(cache_path)
    grid = reader.cache.spec.grid
    (points,) = read_returns(reader.cache, [0], None).values()
    for index in range(len(reader.cache.spec.frames)):
        volume = grid.unpack_volume(reader.read("occupancy", 0)[index])
        cells = grid.cells_from_grid @ reader.read("grid_from_ego", 0)[index].astype(np.float64)
        found = np.zeros_like(volume)
        w, h, z = np.floor(transform(cells, points)).astype(int).T
        inside = (z >= 0) & (z < grid.shape[0]) & (h >= 0) & (h < grid.shape[1]) & (w >= 0) & (w < grid.shape[2])
        found[z[inside], h[inside], w[inside]] = True
        assert inside.sum() > 1000
        assert (found != volume).sum() <= 5  # returns on a cell's border


def test_the_returns_shown_are_those_in_the_occupied_voxels(serial):
    assert_every_return_lies_in_an_occupied_voxel(serial / "mini_train.zarr")


def test_on_the_real_keyframe_returns_voxels_and_vehicles_coincide(real_sample, tmp_path):
    arguments = ["--dataroot", real_sample, "--cache", tmp_path, "--split", "mini_train", "--teacher", "none"]
    run("build", *arguments, "--labels", "vehicles", "--workers", "0")
    assert_every_return_lies_in_an_occupied_voxel(tmp_path / "mini_train.zarr")
    reader = CacheReader(tmp_path / "mini_train.zarr")
    grid = reader.cache.spec.grid
    volume = grid.unpack_volume(reader.read("occupancy", 0)[0])
    vehicles = grid.unpack_map(reader.read("labels/vehicles", 0)[0])
    occupied = occupied_at_body_height(volume, grid, inverse_rigid(GRID_FROM_EGO_AXES))
    assert occupied[vehicles].mean() > 10 * occupied[~vehicles].mean()
    mirrored = vehicles[:, ::-1]
    assert occupied[mirrored].mean() < 0.5 * occupied[vehicles].mean()

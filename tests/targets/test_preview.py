import re
from concurrent.futures import ThreadPoolExecutor

import matplotlib.style
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image

from occfeat_targets.cache.create import create_cache
from occfeat_targets.cache.geometry import GRID_FROM_EGO_AXES, inverse_rigid, project, transform
from occfeat_targets.cache.labels import LABEL_KINDS
from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.pictures.birdseye import occupied_at_body_height
from occfeat_targets.pictures.cameras import read_features
from occfeat_targets.pictures.canvas import png
from occfeat_targets.pictures.colors import height_scale
from occfeat_targets.pictures.page import choose_keyframes, fit_features, read_returns, write_preview
from occfeat_targets.pictures.sheet import WIDTH, draw_keyframe, why_absent
from tests.conftest import SMALL_GRID, random_arrays, small_identity, small_spec
from tests.targets.command_line import run

GREY = (100, 100, 100)
INTRINSICS = np.array([[20, 0, 12], [0, 20, 8], [0, 0, 1]], np.float32)
YAWS = np.deg2rad([60, 0, -60, 120, 180, -120])  # yaws of CAMERAS, measured to the left from the ego's x axis


def cam_from_ego(yaw):
    """A camera at the ego's origin that looks horizontally along `yaw` [rad]."""
    x = (np.sin(yaw), -np.cos(yaw), 0)  # right
    z = (np.cos(yaw), np.sin(yaw), 0)
    matrix = np.eye(4)
    matrix[:3, :3] = [x, (0, 0, -1), z]
    return matrix


def make_cache(tmp_path, occupied=(), *, spec=None, simulated=(), skipped=(), **contents):
    """A cache with grey images, known calibration and the same occupied voxels (z, h, w) in every keyframe."""
    spec = spec or small_spec(teacher=None)
    provenance = {"simulated": list(simulated)}
    cache = create_cache(tmp_path / "train.zarr", spec, small_identity(3), keyframes_per_shard=3, provenance=provenance)
    volume = np.zeros(SMALL_GRID.shape, np.bool_)
    for index in occupied:
        volume[index] = True
    arrays = {a.name: np.zeros((3, *a.shape), a.dtype) for a in spec.arrays()}
    arrays["is_valid"][:] = [i not in skipped for i in range(3)]
    arrays["camera_valid"][:] = True
    arrays["image_area"][:] = (0, 0, *spec.image_size)
    arrays["images"][:] = GREY
    arrays["intrinsics"][:] = INTRINSICS
    arrays["cam_from_ego"][:] = np.resize([cam_from_ego(yaw) for yaw in YAWS], (len(spec.cameras), 4, 4))
    arrays["grid_from_ego"][:] = GRID_FROM_EGO_AXES
    arrays["occupancy"][:] = SMALL_GRID.pack_volume(volume)
    if "vehicles" in spec.labels:
        arrays["labels/vehicles_valid"][:] = 255
    for name, values in contents.items():
        arrays[name][:] = values
    tokens = cache.identity.tokens
    cache.write_shard(0, arrays, {"skipped": {tokens[i]: f"no JPEG for {tokens[i]}" for i in skipped}, "cosine": None})
    return CacheReader(cache)


def pixels(figure):
    """(height, width, 3) int64 colours of the drawn figure."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].astype(np.int64)


def color_at(axes, drawn, points):
    """(n, 3) colours of the drawn figure at points (n, 2) in an axes' own units."""
    x, y = axes.transData.transform(points).T
    return drawn[(len(drawn) - y).astype(int), x.astype(int)]


def views(sheet, name):
    """The pictures of one camera, in the sheet's order."""
    return [
        axes
        for axes in sheet.axes
        if name in [text.get_text() for text in axes.texts] and axes.images and not axes.axison
    ]


def maps(sheet):
    """The bird's-eye pictures."""
    return [axes for axes in sheet.axes if axes.get_xlabel() == "right [m]"]


def texts(sheet):
    return [text.get_text() for text in sheet.findobj(Text) if text.get_text()]


def size(file):
    with Image.open(file) as image:
        return image.size


@pytest.mark.parametrize("camera", range(6))
def test_a_voxel_is_drawn_at_the_projection_of_its_centre_and_in_no_other_camera(tmp_path, camera):
    centers = SMALL_GRID.voxel_centers()
    ego = transform(inverse_rigid(GRID_FROM_EGO_AXES), centers)
    projected, depth, is_valid = project(INTRINSICS, transform(cam_from_ego(YAWS[camera]), ego), (16, 24))
    inside = is_valid & (depth > 2) & (abs(projected - (12, 9)) < (4, 3)).all(axis=-1)
    index = tuple(np.argwhere(inside)[len(np.argwhere(inside)) // 2])
    reader = make_cache(tmp_path, [index])
    names = reader.cache.spec.cameras
    sheet = draw_keyframe(reader, 1)
    (axes,) = views(sheet, names[camera])
    (dots,) = axes.collections
    np.testing.assert_allclose(dots.get_offsets(), projected[index][None], atol=1e-4)
    color = height_scale(SMALL_GRID).to_rgba(centers[index][2], bytes=True)[:3]
    drawn = pixels(sheet)
    np.testing.assert_allclose(color_at(axes, drawn, projected[index][None])[0], color, atol=2)
    np.testing.assert_allclose(color_at(axes, drawn, projected[index][None] + (2, 2))[0], GREY, atol=2)
    others = [len(views(sheet, name)[0].collections[0].get_offsets()) for name in names if name != names[camera]]
    assert others == [0] * 5


def test_an_image_is_drawn_at_its_own_resolution(tmp_path):
    image = np.zeros((16, 24, 3), np.uint8)
    image[4:12, 6:18] = (250, 10, 10)
    reader = make_cache(tmp_path, images=image)
    sheet = draw_keyframe(reader, 0)
    (axes,) = views(sheet, "CAM_BACK")
    found = color_at(axes, pixels(sheet), np.array([(12, 8), (8, 6), (12, 14.5), (20.5, 8)]))
    np.testing.assert_allclose(found, [(250, 10, 10)] * 2 + [(0, 0, 0)] * 2, atol=12)


def test_a_voxel_ahead_is_above_the_ego_and_a_voxel_to_the_right_is_right_of_it(tmp_path):
    z, h, w = 3, 10, 6  # the cell in front and to the right of the origin
    cells = [(z, h + 8, w), (z - 3, h, w + 5)]
    sheet = draw_keyframe(make_cache(tmp_path, cells), 0)
    axes, drawn = maps(sheet)[0], pixels(sheet)
    centers = np.array([SMALL_GRID.voxel_centers()[index] for index in cells])
    expected = height_scale(SMALL_GRID).to_rgba(centers[:, 2], bytes=True)[:, :3]
    np.testing.assert_allclose(color_at(axes, drawn, centers[:, :2]), expected, atol=2)
    ahead, right = axes.transData.transform(centers[:, :2])
    ego = axes.transData.transform((0, 0))
    assert ahead[1] > ego[1] + 200 and right[0] > ego[0] + 130
    assert ahead[1] - right[1] == pytest.approx(8 * 30, abs=1)  # 8 cells of 1 m, 600 px for 20 m
    assert right[0] - ahead[0] == pytest.approx(5 * 30, abs=1)


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
        drawn = pixels(sheet)
        for camera, name in enumerate(spec.cameras):
            _, axes = views(sheet, name)
            corner, other = color_at(axes, drawn, np.array([(23, 1), (12, 15)]))  # tokens (0, 2) and (1, 1) of 2x3
            corners.add(tuple(corner.tolist()))
            np.testing.assert_allclose(other, shared(features[keyframe, camera, 1, 1]), atol=1)
    assert len(corners) == 1


def test_a_legend_has_the_colours_of_the_map(tmp_path):
    rows = np.arange(20)
    masks = [np.repeat(((rows == 4 * k) | (rows == 4 * k + 1))[:, None], 12, axis=1) for k in range(5)]
    vehicles = np.zeros((20, 12), np.bool_)
    vehicles[:, :3] = True
    contents = {"labels/map": SMALL_GRID.pack_map(np.stack(masks)), "labels/vehicles": SMALL_GRID.pack_map(vehicles)}
    sheet = draw_keyframe(make_cache(tmp_path, **contents), 0)
    axes, drawn = maps(sheet)[1], pixels(sheet)
    legend = axes.get_legend()
    found = {
        text.get_text(): np.rint(255 * np.array(to_rgb(patch.get_facecolor())))
        for text, patch in zip(legend.get_texts(), legend.get_patches(), strict=True)
    }
    for k, name in enumerate(LABEL_KINDS["map"].classes):
        shown = color_at(axes, drawn, np.array([(4.5, -10 + 4 * k + 0.5)]))[0]
        np.testing.assert_array_equal(shown, found[name.replace("_", " ")])
    np.testing.assert_array_equal(color_at(axes, drawn, np.array([(-5.5, 8.5)]))[0], found["vehicles"])


def test_the_same_keyframe_gives_the_same_bytes_even_in_threads(tmp_path):
    reader = make_cache(tmp_path, [(3, 18, 6)])
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda keyframe: png(draw_keyframe(reader, keyframe)), [0, 0])
    assert first == second == png(draw_keyframe(reader, 0))


def test_the_style_of_the_process_changes_no_picture(tmp_path):
    reader = make_cache(tmp_path, [(3, 18, 6)])
    expected = png(draw_keyframe(reader, 0))
    with matplotlib.style.context(["seaborn-v0_8-whitegrid", {"font.size": 20}]):  # the devkit's maps set this style
        assert png(draw_keyframe(reader, 0)) == expected
        assert matplotlib.rcParams["font.size"] == 20


@pytest.mark.parametrize("count", [1, 2, 7, 11])
def test_the_sheet_shows_any_number_of_cameras_with_any_names(tmp_path, count):
    names = tuple(f"$ring_{i}^{i} camera" for i in range(count))
    turned = [cam_from_ego(yaw) for yaw in 0.1 + 2 * np.pi * np.arange(count) / count]
    spec = small_spec(cameras=names)
    sheet = draw_keyframe(make_cache(tmp_path, [(3, 18, 6)], spec=spec, cam_from_ego=turned), 0)
    pixels(sheet)
    assert all(len(views(sheet, name)) == 2 for name in names)
    boxes = [axes.bbox for axes in sheet.axes]
    assert min(box.x0 for box in boxes) >= 0 and max(box.x1 for box in boxes) <= WIDTH
    assert min(box.y0 for box in boxes) >= 0 and max(box.y1 for box in boxes) <= sheet.bbox.height
    for i, a in enumerate(boxes):
        assert not any(
            min(a.x1, b.x1) > max(a.x0, b.x0) + 1 and min(a.y1, b.y1) > max(a.y0, b.y0) + 1 for b in boxes[:i]
        )


def test_the_nearer_of_two_voxels_is_drawn_last(tmp_path):
    near, far = cells = [(3, 15, 6), (3, 18, 6)]  # 5.5 and 8.5 m ahead of CAM_FRONT
    projected = {}
    for index in cells:
        ego = transform(inverse_rigid(GRID_FROM_EGO_AXES), SMALL_GRID.voxel_centers()[index])
        projected[index], _, _ = project(INTRINSICS, transform(cam_from_ego(0), ego), (16, 24))
    (axes,) = views(draw_keyframe(make_cache(tmp_path, cells), 0), "CAM_FRONT")
    np.testing.assert_allclose(axes.collections[0].get_offsets(), [projected[far], projected[near]], atol=1e-4)


def test_int8_features_are_multiplied_by_their_scale(tmp_path):
    spec = small_spec(feature_dtype="int8")
    scale = np.arange(36, dtype=np.float16).reshape(6, 2, 3)
    reader = make_cache(tmp_path, spec=spec, features=np.int8(-3), feature_scale=scale)
    features, _ = read_features(reader, 0)
    np.testing.assert_array_equal(features, np.broadcast_to(-3.0 * scale[..., None], (6, 2, 3, 8)))


def test_a_masked_camera_is_black_and_labelled_as_masked(tmp_path):
    valid = np.array([True, True, True, True, False, True])
    pose = np.array([cam_from_ego(yaw) for yaw in YAWS]) * valid[:, None, None]
    images = np.full((6, 16, 24, 3), GREY, np.uint8) * valid[:, None, None, None].astype(np.uint8)
    intrinsics = INTRINSICS * valid[:, None, None]
    contents = {"camera_valid": valid, "cam_from_ego": pose, "intrinsics": intrinsics, "images": images}
    sheet = draw_keyframe(make_cache(tmp_path, [(3, 18, 6)], **contents), 0)
    drawn = pixels(sheet)
    for number, name in enumerate(small_spec().cameras):
        (axes,) = views(sheet, name)
        assert ("MASKED" in [text.get_text() for text in axes.texts]) == (not valid[number])
        corner = color_at(axes, drawn, np.array([(22, 15)]))[0]
        np.testing.assert_allclose(corner, GREY if valid[number] else (0, 0, 0), atol=2)
    named = [text.get_text() for text in maps(sheet)[0].texts]
    assert "CAM_BACK" not in named and "CAM_BACK_LEFT" in named


def test_points_and_features_outside_a_cameras_area_are_not_shown(tmp_path):
    voxels = [(z, h, w) for z in range(4) for h in range(12, 20) for w in range(12)]
    area = (0, 8, 16, 16)  # the middle third of 16x24 pixels, with the middle column of tokens
    features = np.random.default_rng(0).normal(size=(6, 2, 3, 8))
    reader = make_cache(tmp_path, voxels, spec=small_spec(), image_area=area, features=features)
    view, shown = views(draw_keyframe(reader, 0), "CAM_FRONT")
    u = view.collections[0].get_offsets()[:, 0]
    assert len(u) > 20 and u.min() >= 8 and u.max() < 16
    colors = shown.images[0].get_array()
    assert not colors[:, [0, 2]].any() and colors[:, 1].any()
    _, is_shown = read_features(reader, 0)
    np.testing.assert_array_equal(is_shown, np.broadcast_to([False, True, False], (6, 2, 3)))


def test_simulated_data_has_a_banner_and_real_data_has_none(tmp_path):
    text = "the city is synthetic and " + " and ".join(f"part {i} is simulated" for i in range(30))
    real = draw_keyframe(make_cache(tmp_path / "real"), 0)
    simulated = draw_keyframe(make_cache(tmp_path / "simulated", simulated=[text]), 0)
    red, none = ((pixels(sheet) == (200, 32, 28)).all(axis=-1).sum() for sheet in (simulated, real))
    assert none == 0
    assert red > 60 * WIDTH
    assert f"SIMULATED: {text}" in [found.replace("\n", " ") for found in texts(simulated)]
    assert not any("SIMULATED" in found for found in texts(real))
    assert simulated.bbox.height > real.bbox.height + 60


def test_a_skipped_keyframe_is_not_drawn_as_zeros(tmp_path):
    reader = make_cache(tmp_path, [(3, 18, 6)], skipped=[1])
    assert why_absent(reader, 0) is None
    assert why_absent(reader, 1) == ("SKIPPED: this keyframe has no targets", "no JPEG for token1")
    good, skipped = draw_keyframe(reader, 0), draw_keyframe(reader, 1)
    assert skipped.bbox.height < good.bbox.height / 2
    assert len(good.axes) > 6 and not skipped.axes
    assert {"SKIPPED: this keyframe has no targets", "no JPEG for token1"} <= set(texts(skipped))
    assert write_preview(reader.cache, tmp_path / "out", [1], points=True, progress=False).is_file()


def test_a_keyframe_that_is_not_built_yet_is_reported(small_cache, tmp_path):
    with pytest.raises(ValueError, match="nothing of .* is built yet"):
        choose_keyframes(small_cache)
    small_cache.write_shard(0, random_arrays(small_cache, 0), {"skipped": {}, "cosine": None})
    assert choose_keyframes(small_cache) == [0, 1, 2]
    reader = CacheReader(small_cache, allow_incomplete=True)
    assert why_absent(reader, 3)[0] == "NOT BUILT YET"
    assert "NOT BUILT YET" in texts(draw_keyframe(reader, 3))
    assert write_preview(small_cache, tmp_path / "out", [2, 3], progress=False).is_file()


def test_the_page_shows_every_sheet_and_states_what_is_simulated(finished_cache, tmp_path):
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
    assert size(page.parent / names[1])[0] == WIDTH
    assert "SIMULATED" not in write_preview(finished_cache, tmp_path / "real", [0], progress=False).read_text()


def test_keyframes_are_chosen_by_number_by_token_or_evenly(finished_cache):
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


def test_requests_that_a_cache_cannot_fulfil_are_refused_with_the_alternatives(finished_cache, tmp_path):
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
def test_panels_are_drawn_for_the_labels_of_the_cache(tmp_path, labels):
    reader = make_cache(tmp_path, [(3, 18, 6)], spec=small_spec(teacher=None, labels=labels))
    assert len(maps(draw_keyframe(reader, 0))) == 1 + bool(labels) + ("vehicles" in labels)


def test_the_command_writes_a_page_and_accepts_every_option(city, serial, tmp_path):
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
        assert (found != volume).sum() <= 5  # returns at a cell's border


def test_the_returns_shown_lie_in_the_occupied_voxels(serial):
    assert_every_return_lies_in_an_occupied_voxel(serial / "mini_train.zarr")


def test_on_the_real_keyframe_returns_voxels_and_vehicles_coincide(real_sample, tmp_path):
    arguments = ["--dataroot", real_sample, "--cache", tmp_path, "--split", "mini_train", "--teacher", "none"]
    run("build", *arguments, "--label-kinds", "vehicles", "--workers", "0")
    assert_every_return_lies_in_an_occupied_voxel(tmp_path / "mini_train.zarr")
    reader = CacheReader(tmp_path / "mini_train.zarr")
    grid = reader.cache.spec.grid
    volume = grid.unpack_volume(reader.read("occupancy", 0)[0])
    vehicles = grid.unpack_map(reader.read("labels/vehicles", 0)[0])
    occupied = occupied_at_body_height(volume, grid, inverse_rigid(GRID_FROM_EGO_AXES))
    assert occupied[vehicles].mean() > 10 * occupied[~vehicles].mean()
    mirrored = vehicles[:, ::-1]
    assert occupied[mirrored].mean() < 0.5 * occupied[vehicles].mean()

"""The sheet of a keyframe: what is drawn where, and in which colours."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import matplotlib.style
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from occfeat_targets.cache.geometry import GRID_FROM_EGO_AXES, inverse_rigid, project, transform
from occfeat_targets.cache.labels import LABEL_KINDS
from occfeat_targets.pictures.cameras import read_features
from occfeat_targets.pictures.canvas import png
from occfeat_targets.pictures.colors import height_scale
from occfeat_targets.pictures.page import fit_features
from occfeat_targets.pictures.sheet import WIDTH, draw_keyframe
from tests.conftest import SMALL_GRID, small_spec
from tests.targets.sheets import (
    GREY,
    INTRINSICS,
    YAWS,
    cam_from_ego,
    color_at,
    make_cache,
    maps,
    pixels,
    texts,
    views,
)


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


@pytest.mark.parametrize("labels", [(), ("map",), ("vehicles",)])
def test_panels_are_drawn_for_the_labels_of_the_cache(tmp_path, labels):
    reader = make_cache(tmp_path, [(3, 18, 6)], spec=small_spec(teacher=None, labels=labels))
    assert len(maps(draw_keyframe(reader, 0))) == 1 + bool(labels) + ("vehicles" in labels)

"""The synthetic city's geometry: rays against closed forms, ground against the map, LiDAR against the cameras."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from occfeat_targets.cache.geometry import inverse_rigid, rotation_matrix, transform
from occfeat_targets.synth import ground, shapes
from occfeat_targets.synth.camera import count_visible, render
from occfeat_targets.synth.city import ScenePlan, district_of, plan_scenes, scene_of
from occfeat_targets.synth.expansion import write_map
from occfeat_targets.synth.filming import plan_shots
from occfeat_targets.synth.layout import CURB_HEIGHT
from occfeat_targets.synth.lidar import cast_sweep
from occfeat_targets.synth.raycast import FAR, GROUND, SKY, trace
from occfeat_targets.synth.rig import CAMERAS, EGO_FROM_LIDAR, body_pose, quaternion
from occfeat_targets.synth.shapes import AXLE, BOX, ELLIPSOID, TAPERED, UPRIGHT, compose, solid
from occfeat_targets.synth.world import Stage

LOCATION, KEYFRAMES = "singapore-onenorth", 9
GREY = (0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def district():
    return district_of(4, LOCATION, 1)


@pytest.fixture(scope="module")
def scene(district):
    (plan,) = plan_scenes(["scene-0061"], [])
    return scene_of(4, plan, district, KEYFRAMES)


@pytest.fixture(scope="module")
def yard(district):
    """Centre (x, y) of a raised block, where tests place objects."""
    rect = district.blocks[4].rect
    return district.to_global(np.array([(rect.u0 + rect.u1) / 2, (rect.v0 + rect.v1) / 2]))


def alone(district, *solids, pose):
    """A world that contains one shape."""
    return Stage([compose(*solids)], ground.pack_ground(district)).at(np.array([pose], np.float64))


def hit(world, origin, direction):
    d = np.asarray(direction, float) / np.linalg.norm(direction)
    return trace(*origin, *d, FAR, False, world)[:2]


@pytest.mark.parametrize(
    ("kind", "half", "taper", "expected"),
    [
        (BOX, (1, 2, 3), (0, 0, 0), 9.0),
        (TAPERED, (1, 2, 3), (0.5, 0, 0), 9.25),
        (ELLIPSOID, (1, 2, 3), (0, 0, 0), 9.0),
        (UPRIGHT, (2, 2, 3), (0, 0, 0), 8.0),
        (AXLE, (3, 2, 3), (0, 0, 0), 7.0),
    ],
)
def test_a_ray_through_a_solids_centre_hits_its_surface(district, yard, kind, half, taper, expected):
    x, y = yard
    world = alone(district, solid(kind, 0, GREY, (0, 0, 5), half, taper), pose=(x, y, 1.0, 0.7))
    ahead = np.array([np.cos(0.7), np.sin(0.7), 0])
    distance, what = hit(world, np.array([x, y, 6.0]) + 10 * ahead, -ahead)
    assert what == 0
    assert distance == pytest.approx(expected, abs=1e-9)
    assert hit(world, np.array([x, y, 6.0]) + 10 * ahead, ahead)[1] == SKY
    assert hit(world, np.array([x, y, 9.5]) + 10 * ahead, -ahead)[1] == SKY


def test_the_ground_is_met_at_the_curb_height_on_a_block_and_at_zero_on_the_road(district, yard):
    world = alone(district, solid(BOX, 0, GREY, (0, 0, 1), (1, 1, 1)), pose=(*yard + 30, 0, 0))
    road = district.to_global(np.array([district.avenues[1].centre, district.streets[1].centre]))
    assert hit(world, (*yard, 3.0), (0, 0, -1)) == pytest.approx((3.0 - CURB_HEIGHT, GROUND))
    assert hit(world, (*road, 3.0), (0, 0, -1)) == pytest.approx((3.0, GROUND))


def test_a_low_ray_from_the_road_meets_the_face_of_the_curb(district):
    avenue, street = district.avenues[1], district.streets[1]
    uv = np.array([avenue.high - 1.0, street.high + 30])
    origin, beyond = district.to_global(uv), district.to_global(uv + np.array([2.0, 0.0]))
    world = alone(district, solid(BOX, 0, GREY, (0, 0, 1), (1, 1, 1)), pose=(*origin + 99, 0, 0))
    down = np.array([*(beyond - origin), -0.02 * np.linalg.norm(beyond - origin)])
    distance, what = hit(world, (*origin, CURB_HEIGHT / 2), down)
    assert what == GROUND
    assert distance == pytest.approx(np.hypot(1.0, 0.02), abs=2e-3)


def test_street_coordinates_round_trip_exactly(district):
    uv = np.random.default_rng(0).uniform(-150, 150, (500, 2))
    np.testing.assert_allclose(district.to_street(district.to_global(uv)), uv, atol=1e-9)
    frame = ground.pack_ground(district)
    x, y = district.to_global(uv[0])
    np.testing.assert_allclose(ground.street_coordinates(x, y, frame), uv[0], atol=1e-9)
    step = 1e-5 * np.array([0.6, 0.8])
    ahead = (district.to_global(uv + step) - district.to_global(uv - step)).T
    heading = district.heading(uv, np.broadcast_to(step, uv.shape))
    np.testing.assert_allclose(np.cos(heading - np.arctan2(ahead[1], ahead[0])), 1, atol=1e-9)


def test_quaternions_round_trip_to_their_matrices():
    rng = np.random.default_rng(1)
    for _ in range(50):
        pose = body_pose(0, 0, 0, *rng.uniform(-np.pi, np.pi, 3))[:3, :3]
        np.testing.assert_allclose(rotation_matrix(quaternion(pose)), pose, atol=1e-12)
    for diagonal in ((1, -1, -1), (-1, 1, -1), (-1, -1, 1)):
        np.testing.assert_allclose(rotation_matrix(quaternion(np.diag(diagonal))), np.diag(diagonal), atol=1e-12)


def test_cameras_look_where_their_names_say():
    ahead = {c.channel: c.ego_from_sensor[:3, 2] for c in CAMERAS}
    assert ahead["CAM_FRONT"][0] > 0.99
    assert ahead["CAM_BACK"][0] < -0.99
    assert ahead["CAM_FRONT_LEFT"][1] > 0.8 > 0.5 < ahead["CAM_FRONT_LEFT"][0]
    assert ahead["CAM_BACK_RIGHT"][1] < -0.9
    # The LiDAR's y axis points forward, its x axis to the right.
    np.testing.assert_allclose(EGO_FROM_LIDAR[:3, :2], [[0, 1], [-1, 0], [0, 0]], atol=0.03)


@pytest.mark.slow
def test_the_map_agrees_with_the_painted_ground(district, tmp_path):
    map_api = pytest.importorskip("nuscenes.map_expansion.map_api", reason="nuscenes-devkit is not installed")
    from nuscenes.utils.map_mask import MapMask

    mask = MapMask(str(tmp_path / write_map(tmp_path, 4, LOCATION, [district])))
    city_map = map_api.NuScenesMap(str(tmp_path), LOCATION)
    layers = {
        "drivable_area": [ground.ROAD, ground.CROSSING, ground.STOP_LINE, ground.CAR_PARK, ground.DRIVEWAY],
        "ped_crossing": [ground.CROSSING],
        "walkway": [ground.CURB, ground.WALKWAY],
        "stop_line": [ground.STOP_LINE],
        "carpark_area": [ground.CAR_PARK],
    }
    uv = np.random.default_rng(2).uniform(-150, 150, (40_000, 2))
    xy = district.to_global(uv)
    regions = ground.classify_points(xy, ground.pack_ground(district))
    drivable = np.isin(regions, layers["drivable_area"])
    assert np.mean(mask.is_on_mask(xy[:, 0], xy[:, 1]) == drivable) > 0.997

    chosen = np.concatenate([np.nonzero(regions == r)[0][:25] for r in np.unique(regions)])
    wrong = 0
    for n in chosen:
        found = city_map.layers_on_point(*xy[n], layer_names=list(layers))
        wrong += any((found[layer] != "") != (regions[n] in inside) for layer, inside in layers.items())
    assert len(chosen) > 250
    assert wrong <= 1, "only points within a centimetre of an edge may differ"


def test_every_connector_joins_two_lanes_without_a_gap(district, tmp_path):
    map_api = pytest.importorskip("nuscenes.map_expansion.map_api", reason="nuscenes-devkit is not installed")
    write_map(tmp_path, 4, LOCATION, [district])
    city_map = map_api.NuScenesMap(str(tmp_path), LOCATION)
    for lane in city_map.lane:
        assert city_map.get_outgoing_lane_ids(lane["token"]) or city_map.get_incoming_lane_ids(lane["token"])
    for connector in city_map.lane_connector:
        (before,) = city_map.get_incoming_lane_ids(connector["token"])
        (after,) = city_map.get_outgoing_lane_ids(connector["token"])
        poses = [np.array(v) for v in city_map.discretize_lanes([before, connector["token"], after], 0.5).values()]
        assert np.linalg.norm(poses[1][0, :2] - poses[0][-1, :2]) < 1e-3
        assert np.linalg.norm(poses[1][-1, :2] - poses[2][0, :2]) < 1e-3
    stretch = city_map.lane[0]
    assert city_map.get_closest_lane(*discretised_middle(city_map, stretch["token"])) == stretch["token"]
    box = (*district.centre, 200.0, 200.0)
    masks = city_map.get_map_mask(box, 30.0, ["drivable_area", "lane", "walkway", "road_divider"], (200, 200))
    assert (masks.mean((1, 2)) > 0.005).all()


def discretised_middle(city_map, token):
    poses = city_map.discretize_lanes([token], 0.5)[token]
    return poses[len(poses) // 2][:2]


def test_the_visible_share_follows_from_occlusion(district, yard):
    camera = CAMERAS[0]
    near, far = (
        compose(solid(BOX, 0, GREY, (0, 0, 2), (0.05, 3, 2))),
        compose(solid(BOX, 0, GREY, (0, 0, 1), (0.05, 1, 1))),
    )
    stage = Stage([near, far, far, far], ground.pack_ground(district))
    ego = body_pose(*yard, CURB_HEIGHT, 0.0, 0.0, 0.0)
    x, y = yard
    z = CURB_HEIGHT
    # A wide wall at 11.7 m. Behind it, one box is hidden, one is half visible at the shadow's edge, and one is visible.
    shadow = 3 * (22 - 1.7) / (11.7 - 1.7 - 0.05)
    poses = [[x + 11.7, y, z, 0], [x + 22, y, z, 0], [x + 22, y + shadow, z, 0], [x + 22, y + shadow + 4, z, 0]]
    world = stage.at(np.array(poses, np.float64))
    size = (360, 640)
    pose, k = ego @ camera.ego_from_sensor, camera.intrinsics(size)
    light = scene_light()
    counts = count_visible(pose, k, world, render(pose, k, size, world, light), np.arange(4))
    share = counts[:, 1] / counts[:, 0]
    np.testing.assert_allclose(share, [1, 0, 0.5, 1], atol=0.06)


def scene_light():
    from occfeat_targets.synth.camera import Light

    return Light(np.array([0.0, 0.6, 0.8]), np.ones(3), np.full(3, 0.4), 0.2)


@pytest.mark.parametrize("camera", CAMERAS, ids=lambda c: c.channel)
def test_lidar_points_lie_on_the_surfaces_that_the_cameras_see(scene, camera):
    size, at, fixed = (225, 400), 2.0, len(scene.scenery)
    sweep = cast_sweep(scene.ego_pose(at), scene.world(at), np.random.default_rng(0))
    # Each camera has its own timestamp, at which the ego and the moving actors were elsewhere.
    t = at + camera.delay_us * 1e-6
    pose = scene.ego_pose(t) @ camera.ego_from_sensor
    picture = render(pose, camera.intrinsics(size), size, scene.world(t), scene.light)

    at_rest = (sweep.objects == GROUND) | ((sweep.objects >= 0) & (sweep.objects < fixed))
    points = transform(scene.ego_pose(at) @ EGO_FROM_LIDAR, sweep.points[at_rest, :3].astype(np.float64))
    in_camera = transform(inverse_rigid(pose), points)
    in_camera = in_camera[in_camera[:, 2] > 1]
    u, v, _ = camera.intrinsics(size) @ (in_camera / in_camera[:, 2:]).T
    inside = (u >= 1) & (u < size[1] - 1) & (v >= 1) & (v < size[0] - 1)
    u, v, depth = u[inside].astype(int), v[inside].astype(int), in_camera[inside, 2]
    around = np.stack([picture.depth[v + dv, u + du] for dv in (-1, 0, 1) for du in (-1, 0, 1)])
    assert len(depth) > 800
    # The surface's depth lies between the depths of the pixel and its neighbours, unless it is hidden from the camera.
    # In no case may the camera see through the surface.
    slack = 0.08 + 0.01 * depth
    assert np.mean(around.min(0) <= depth + slack) > 0.998
    assert np.mean((around.min(0) <= depth + slack) & (around.max(0) >= depth - slack)) > 0.9


def test_moving_actors_have_another_position_at_another_sensors_time(scene):
    a, b = scene.actor_poses(1.0), scene.actor_poses(1.0 - 0.043)
    moved = np.linalg.norm(a[:, :2] - b[:, :2], axis=1)
    attributes = np.array([actor.attribute for actor in scene.actors])
    assert moved[np.isin(attributes, ["vehicle.parked", "vehicle.stopped", "pedestrian.standing"])].max() == 0
    assert np.median(moved[attributes == "vehicle.moving"]) > 0.1


def test_traffic_keeps_its_distance(scene):
    driving = [n for n, a in enumerate(scene.actors) if a.attribute in ("vehicle.moving", "cycle.with_rider")]
    assert len(driving) > 10
    for t in np.linspace(0, 4, 9):
        spots = np.concatenate([scene.actor_poses(t)[driving, :2], scene.ego.at(t)[None, :2]])
        apart = np.linalg.norm(spots[:, None] - spots, axis=-1)
        assert apart[np.triu_indices(len(spots), 1)].min() > 1.3


def test_the_ego_turns_a_corner_and_brakes_for_it(scene):
    t = np.linspace(0, 4, 81)
    poses = scene.ego.at(t)
    speed = np.linalg.norm(np.diff(poses[:, :2], axis=0), axis=1) / 0.05
    assert np.degrees(np.ptp(poses[:, 2])) > 60
    assert speed.max() < 10.6
    assert speed.min() < 6
    tilt = np.array([scene.ego_pose(s)[2, :2] for s in t])
    assert (np.ptp(tilt, axis=0) > np.radians(0.3)).all(), "the body must pitch and roll"


def test_a_shapes_bounds_enclose_all_ray_hits(district, yard):
    rng = np.random.default_rng(3)
    makers = (shapes.car, shapes.truck, shapes.bus, shapes.pedestrian, shapes.bicycle, shapes.motorcycle, shapes.cone)
    for make in makers:
        shape = make(rng)
        world = Stage([shape], ground.pack_ground(district)).at(np.array([[*yard, CURB_HEIGHT, 0.3]]))
        low, high = shape.bounds
        assert abs(low[2]) < 1e-9
        assert np.abs(low[:2] + high[:2]).max() < 0.35
        foot, hits = np.array([*yard, CURB_HEIGHT]), []
        for _ in range(400):
            angle = rng.uniform(0, 2 * np.pi)
            away = np.array([np.cos(angle), np.sin(angle), 0]) * 15
            origin = foot + away + np.array([0, 0, rng.uniform(0, 3.5)])
            target = foot + rng.uniform([-1, -1, 0], 1) * high
            d = (target - origin) / np.linalg.norm(target - origin)
            distance, what, _ = trace(*origin, *d, FAR, False, world)
            if what == 0:
                p = origin + distance * d - foot
                c, s = np.cos(0.3), np.sin(0.3)
                hits.append([c * p[0] + s * p[1], c * p[1] - s * p[0], p[2]])
        assert len(hits) > 60
        assert (np.array(hits) > low - 1e-6).all()
        assert (np.array(hits) < high + 1e-6).all()


def test_scenes_past_the_last_site_share_districts(tmp_path: Path):
    plans = [ScenePlan(f"scene-{n:04d}", n, LOCATION, 0) for n in range(13)]
    assert len({p.logfile for p in plans}) == 12
    assert plans[12].site == plans[0].site


def test_intermediate_sweeps_precede_their_keyframe():
    sweeps = [s for s in plan_shots(3, 4) if s.camera is None]
    assert [s.at_us for s in sweeps] == [0, 350_000, 400_000, 450_000, 500_000, 850_000, 900_000, 950_000, 1_000_000]
    assert [s.is_key for s in sweeps] == [True, *[False, False, False, True] * 2]
    assert [s.keyframe for s in sweeps] == [0, 1, 1, 1, 1, 2, 2, 2, 2]

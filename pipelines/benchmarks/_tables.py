"""Tables of a nuScenes data set of any size, without its images and sweeps. By default as many records as v1.0-trainval has.

Values are random but of the right kind: an ego vehicle that drives straight on, boxes around it, a map with its layers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from occfeat_targets.cache.spec import CAMERAS
from occfeat_targets.sources.splits import split_scenes
from occfeat_targets.synth.rig import CAMERAS as RIG
from occfeat_targets.synth.rig import EGO_FROM_LIDAR, quaternion
from occfeat_targets.synth.tables import ATTRIBUTES, CATEGORIES

LIDAR = "LIDAR_TOP"
RADARS = ("RADAR_FRONT", "RADAR_FRONT_LEFT", "RADAR_FRONT_RIGHT", "RADAR_BACK_LEFT", "RADAR_BACK_RIGHT")
TOWNS = ("boston-seaport", "singapore-hollandvillage", "singapore-onenorth", "singapore-queenstown")
VERSION = "v1.0-trainval"
_LAYERS = ("drivable_area", "walkway", "ped_crossing", "carpark_area")


@dataclass(frozen=True)
class Size:
    """Numbers of records. map_polygons: of each layer of each town, with 20 corners each."""

    scenes: int = 850
    samples: int = 34_149
    sample_data: int = 2_631_083
    annotations: int = 1_166_187
    instances: int = 64_386
    map_polygons: int = 1500

    @property
    def keyframes(self) -> list[int]:
        """Number of keyframes of each scene."""
        return _shares(self.samples, self.scenes)


def write_tables(root: Path, size: Size = Size(), seed: int = 0) -> Path:
    """Write root/v1.0-trainval and root/maps/expansion. Returns `root`, as a dataroot."""
    folder = root / VERSION
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    channels = {
        LIDAR: EGO_FROM_LIDAR,
        **{c.channel: c.ego_from_sensor for c in RIG},
        **dict.fromkeys(RADARS, np.eye(4)),
    }
    intrinsics = {c.channel: c.intrinsics((900, 1600)).tolist() for c in RIG}
    splits = split_scenes()
    names = [*splits["train"], *splits["val"]][: size.scenes]
    keyframes = size.keyframes
    small = {
        "category": [{"token": f"category{i}", "name": name, "description": ""} for i, name in enumerate(CATEGORIES)],
        "attribute": [{"token": f"attribute{i}", "name": name, "description": ""} for i, name in enumerate(ATTRIBUTES)],
        "visibility": [{"token": str(i), "level": str(i), "description": ""} for i in range(1, 5)],
        "sensor": [{"token": name, "channel": name, "modality": name.split("_")[0].lower()} for name in channels],
        "log": [
            {"token": f"log{i}", "logfile": f"log{i}", "vehicle": "n015", "date_captured": "2018-07-24", "location": town}
            for i, town in enumerate(TOWNS)
        ],
        "map": [
            {"token": f"map{i}", "log_tokens": [f"log{i}"], "category": "semantic_prior", "filename": f"maps/{i}.png"}
            for i in range(len(TOWNS))
        ],
        "scene": [
            {"token": f"scene{i}", "log_token": f"log{i % len(TOWNS)}", "nbr_samples": n, "name": name, "description": "",
             "first_sample_token": _token("sample", i, 0), "last_sample_token": _token("sample", i, n - 1)}
            for i, (name, n) in enumerate(zip(names, keyframes, strict=True))
        ],
        "calibrated_sensor": [
            {"token": f"{channel}-{i}", "sensor_token": channel, "translation": matrix[:3, 3].tolist(),
             "rotation": quaternion(matrix[:3, :3]), "camera_intrinsic": intrinsics.get(channel, [])}
            for i in range(size.scenes) for channel, matrix in channels.items()
        ],
    }  # fmt: skip
    for table, records in small.items():
        _write(folder / f"{table}.json", (json.dumps(record, indent=0) for record in records))
    _write(folder / "sample.json", _samples(keyframes))
    _write(folder / "sample_data.json", _sample_data(keyframes, size))
    _write(folder / "ego_pose.json", _ego_poses(keyframes, size, rng))
    _write(folder / "instance.json", _instances(size, rng))
    _write(folder / "sample_annotation.json", _annotations(keyframes, size, rng))
    (root / "maps" / "expansion").mkdir(parents=True)
    for i, town in enumerate(TOWNS):
        (root / "maps" / f"{i}.png").touch()
        (root / "maps" / "expansion" / f"{town}.json").write_text(json.dumps(_map(size.map_polygons, rng), indent=0))
    return root


def touch_keyframes(root: Path, first: int, last: int) -> None:
    """Make empty files of the images and sweeps of the keyframes of these scenes, so that none of them is missing."""
    for channel in (LIDAR, *CAMERAS):
        (root / "samples" / channel).mkdir(parents=True, exist_ok=True)
    size_of = json.loads((root / VERSION / "scene.json").read_text())
    for scene in range(first, last):
        for keyframe in range(size_of[scene]["nbr_samples"]):
            for channel in (LIDAR, *CAMERAS):
                (root / keyframe_file(channel, scene, keyframe)).touch()


def _shares(total: int, parts: int) -> list[int]:
    """`total` in so many nearly equal parts, larger ones first."""
    return [total // parts + (i < total % parts) for i in range(parts)]


def _write(file: Path, records: Iterable[str]) -> None:
    with file.open("w") as out:
        out.write("[\n")
        for i, record in enumerate(records):
            out.write(",\n" * (i > 0) + record)
        out.write("\n]")


def _token(kind: str, *numbers: int) -> str:
    """32 hexadecimal digits."""
    value = sum(kind.encode())
    for number in numbers:
        value = value * 1_000_003 + number + 1
    return f"{value * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128:032x}"


def _timestamp(scene: int, keyframe: int, step: int, steps: int) -> int:
    return 1_532_402_927_647_951 + 30_000_000 * scene + 500_000 * keyframe + 500_000 * step // steps


def keyframe_file(channel: str, scene: int, keyframe: int, step: int = 0) -> str:
    """The path of a file, relative to the dataroot. step: 0 for a keyframe's own, else of a later one."""
    ending = "jpg" if channel.startswith("CAM") else "pcd.bin" if channel == LIDAR else "pcd"
    log = "n015-2018-07-24-11-22-45+0800"
    return f"{'sweeps' if step else 'samples'}/{channel}/{log}__{channel}__{scene:03d}{keyframe:03d}{step:02d}.{ending}"


def _frames(keyframes: list[int], size: Size) -> Iterator[tuple[str, int, int, int, int, bool]]:
    """(channel, scene, keyframe, step after it, steps, whether it is the last of its scene and channel) of sample_data."""
    more = size.sample_data - size.samples * (10 + 6 * (len(CAMERAS) + len(RADARS)))  # radar frames
    per_sample, rest = divmod(max(more, 0), size.samples)
    seen = 0
    for scene, n in enumerate(keyframes):
        for channel in (LIDAR, *CAMERAS, *RADARS):
            for keyframe in range(n):
                steps = 10 if channel == LIDAR else 6
                if channel == RADARS[-1]:
                    steps += per_sample + (seen + keyframe < rest)
                for step in range(steps):
                    yield channel, scene, keyframe, step, steps, keyframe == n - 1 and step == steps - 1
        seen += n


def _samples(keyframes: list[int]) -> Iterator[str]:
    for scene, n in enumerate(keyframes):
        for k in range(n):
            before, after = (_token("sample", scene, j) if 0 <= j < n else "" for j in (k - 1, k + 1))
            yield (
                f'{{\n"token": "{_token("sample", scene, k)}",\n"timestamp": {_timestamp(scene, k, 0, 1)},\n"prev": "{before}",\n'
                f'"next": "{after}",\n"scene_token": "scene{scene}"\n}}'
            )


def _sample_data(keyframes: list[int], size: Size) -> Iterator[str]:
    before, token = "", _token("data", 0)
    for i, (channel, scene, keyframe, step, steps, is_last) in enumerate(_frames(keyframes, size)):
        after = "" if is_last else _token("data", i + 1)
        height, width = (900, 1600) if channel.startswith("CAM") else (0, 0)
        yield (
            f'{{\n"token": "{token}",\n"sample_token": "{_token("sample", scene, keyframe)}",\n"ego_pose_token": "{token}",\n'
            f'"calibrated_sensor_token": "{channel}-{scene}",\n"timestamp": {_timestamp(scene, keyframe, step, steps)},\n'
            f'"fileformat": "{"jpg" if height else "pcd"}",\n"is_key_frame": {"false" if step else "true"},\n"height": {height},\n'
            f'"width": {width},\n"filename": "{keyframe_file(channel, scene, keyframe, step)}",\n"prev": "{before}",\n"next": "{after}"\n}}'
        )
        before, token = ("", _token("data", i + 1)) if is_last else (token, after)


def _ego_poses(keyframes: list[int], size: Size, rng: np.random.Generator) -> Iterator[str]:
    noise = rng.uniform(0, 1e-3, (4096, 5)).tolist()
    for i, (_, scene, keyframe, step, steps, _) in enumerate(_frames(keyframes, size)):
        x, y, a, b, c = noise[i % len(noise)]
        seconds = 0.5 * (keyframe + step / steps)
        yield (
            f'{{\n"token": "{_token("data", i)}",\n"timestamp": {_timestamp(scene, keyframe, step, steps)},\n"rotation": [\n'
            f'{0.9999 - a!r},\n{a!r},\n{b!r},\n{c!r}\n],\n"translation": [\n{200.1 + scene + 8 * seconds + x!r},\n{600.1 + scene + y!r},\n0.0\n]\n}}'
        )


def _instances(size: Size, rng: np.random.Generator) -> Iterator[str]:
    car, others = CATEGORIES.index("vehicle.car"), rng.integers(0, len(CATEGORIES), size.instances)
    is_car = rng.uniform(size=size.instances) < 0.4
    n = 0
    for scene, count in enumerate(_shares(size.instances, size.scenes)):
        for i in range(count):
            category = car if is_car[n] else int(others[n])
            n += 1
            yield (
                f'{{\n"token": "{_token("instance", scene, i)}",\n"category_token": "category{category}",\n"nbr_annotations": 1,\n'
                f'"first_annotation_token": "",\n"last_annotation_token": ""\n}}'
            )


def _annotations(keyframes: list[int], size: Size, rng: np.random.Generator) -> Iterator[str]:
    per_sample, rest = divmod(size.annotations, size.samples)
    noise = rng.uniform(-1, 1, (4096, 4)).tolist()
    seen = n = 0
    for scene, (count, instances) in enumerate(zip(keyframes, _shares(size.instances, size.scenes), strict=True)):
        for k in range(count):
            for j in range(per_sample + (seen < rest)):
                a, b, c, d = noise[n % len(noise)]
                instance = _token("instance", scene, (j + (per_sample + 1) * (k // 20)) % instances)
                yield (
                    f'{{\n"token": "{_token("annotation", n)}",\n"sample_token": "{_token("sample", scene, k)}",\n'
                    f'"instance_token": "{instance}",\n"visibility_token": "{1 + n % 4}",\n"attribute_tokens": [\n"attribute0"\n],\n'
                    f'"translation": [\n{200.1 + scene + 4 * k + 40 * a!r},\n{600.1 + scene + 40 * b!r},\n{0.9 + c!r}\n],\n'
                    f'"size": [\n{1.9 + 0.2 * a!r},\n{4.6 + b!r},\n{1.7 + 0.1 * c!r}\n],\n"rotation": [\n{d!r},\n0.0,\n0.0,\n{a!r}\n],\n'
                    f'"prev": "",\n"next": "",\n"num_lidar_pts": 5,\n"num_radar_pts": 0\n}}'
                )
                n += 1
            seen += 1


def _map(polygons: int, rng: np.random.Generator) -> dict[str, object]:
    """A map expansion: `polygons` of 20 corners in each layer of areas, as many lines, scattered over two square kilometres."""
    angles = np.linspace(0, 2 * np.pi, 20, endpoint=False)
    ring = 12 * np.stack([np.cos(angles), np.sin(angles)], 1)
    tables: dict[str, list[dict[str, object]]] = {name: [] for name in ("node", "polygon", "line", *_LAYERS)}
    tables |= {name: [] for name in ("road_segment", "road_block", "lane", "lane_connector", "stop_line")}
    tables |= {name: [] for name in ("road_divider", "lane_divider", "traffic_light", "arcline_path_3", "connectivity")}
    for layer in (*_LAYERS, "road_divider"):
        for i, centre in enumerate(rng.uniform(0, 2000, (polygons, 2))):
            nodes = [f"{layer}-{i}-{j}" for j in range(len(ring))]
            corners = (centre + ring).tolist()
            tables["node"] += [{"token": t, "x": x, "y": y} for t, (x, y) in zip(nodes, corners, strict=True)]
            if layer == "road_divider":
                tables["line"].append({"token": f"line-{i}", "node_tokens": nodes[:2]})
                tables[layer].append({"token": f"{layer}-{i}", "line_token": f"line-{i}", "road_segment_token": None})
                continue
            polygon = {"token": f"polygon-{layer}-{i}", "exterior_node_tokens": nodes, "holes": []}
            tables["polygon"].append(polygon)
            is_area = layer == "drivable_area"
            shape = {"polygon_tokens": [polygon["token"]]} if is_area else {"polygon_token": polygon["token"]}
            tables[layer].append({"token": f"{layer}-{i}", **shape})
    return {**tables, "version": "1.3", "canvas_edge": [2000.0, 2000.0]}

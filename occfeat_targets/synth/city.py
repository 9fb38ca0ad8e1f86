"""Writes the whole data set: choice of scenes and towns, and a folder that is renamed when it is complete."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from occfeat_targets.cache.records import unique_suffix
from occfeat_targets.common.plural import count
from occfeat_targets.common.progress import progress_bar
from occfeat_targets.synth.expansion import write_map
from occfeat_targets.synth.filming import Film, plan_shots
from occfeat_targets.synth.layout import NUM_SITES, District, plan_district
from occfeat_targets.synth.rig import CAMERAS, KEYFRAME_PERIOD_US, LIDAR_CHANNEL, NUM_COLUMNS, NUM_RINGS
from occfeat_targets.synth.scene import Scene, plan_scene
from occfeat_targets.synth.scene_names import choose_names
from occfeat_targets.synth.scenery import build_scenery
from occfeat_targets.synth.tables import Tables
from occfeat_targets.synth.tokens import stream

TRAIN_LOCATION, VAL_LOCATION = "singapore-onenorth", "singapore-hollandvillage"
MAX_SWEEPS = 10
_EPOCH_US = 946_684_800_000_000
_SCENE_GAP_US = 1_000_000_000
# Measured on one core; used only for the estimate that is printed at the start.
_SECONDS_PER_PIXEL, _SECONDS_PER_SWEEP, _BYTES_PER_PIXEL = 1.35e-6, 0.04, 0.25

_README = """This is a synthetic city in nuScenes format, written by occfeat-targets synth (seed {seed}).
It holds no nuScenes data: every image, sweep, box and map was computed. Use it without any restriction.
LiDAR sweeps are instantaneous; a pulse without a return is a point at the sensor's origin with intensity 0.
visibility_token: share of an object's pixels inside the six images that nothing hides; 1 if no camera looks at it.
Load it with nuscenes-devkit: NuScenes("{version}", dataroot) and NuScenesMap(dataroot, "{location}").
"""


@dataclass(frozen=True)
class ScenePlan:
    """Place and time of a scene; `index` counts the scenes of its split."""

    name: str
    index: int
    location: str
    start_us: int

    @property
    def site(self) -> int:
        return self.index % NUM_SITES

    @property
    def logfile(self) -> str:
        return f"synthetic-{self.location}-{self.site:02d}"


def plan_scenes(train: Sequence[str], val: Sequence[str]) -> list[ScenePlan]:
    """Training and validation scenes in separate towns, one district per scene as long as there are enough."""
    placed = [(name, k, TRAIN_LOCATION) for k, name in enumerate(train)]
    placed += [(name, k, VAL_LOCATION) for k, name in enumerate(val)]
    return [ScenePlan(*p, start_us=_EPOCH_US + (n + 1) * _SCENE_GAP_US) for n, p in enumerate(placed)]


def district_of(seed: int, location: str, site: int) -> District:
    """The district at a site, the same for every scene there."""
    return plan_district(location, site, stream(seed, location, site, "streets"))


def scene_of(seed: int, plan: ScenePlan, district: District, keyframes: int) -> Scene:
    """The scene of a plan; in two of three the ego turns at a junction."""
    scenery = build_scenery(district, stream(seed, plan.location, plan.site, "scenery"))
    duration = max(1, keyframes - 1) * KEYFRAME_PERIOD_US * 1e-6
    turns = plan.index % 3 != 1
    return plan_scene(district, scenery, duration, turns, stream(seed, plan.name, "scene"))


def _check(out: Path, scenes: int, val_scenes: int, keyframes: int, image_size: tuple[int, int], sweeps: int) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty: choose another --out, or remove it first")
    if scenes < 0 or val_scenes < 0 or scenes + val_scenes == 0:
        raise ValueError(
            f"{scenes} training and {val_scenes} validation scenes: there must be at least one scene in total"
        )
    if keyframes < 1:
        raise ValueError(f"keyframes is {keyframes}, it must be at least 1")
    if not 1 <= sweeps <= MAX_SWEEPS:
        raise ValueError(f"sweeps_per_keyframe is {sweeps}, it must be 1..{MAX_SWEEPS}: 20 Hz sweeps, 2 Hz keyframes")
    if min(image_size) < 16:
        raise ValueError(f"image_size is {image_size}, (height, width) must be at least 16 each")


def write_city(
    out: Path,
    *,
    scenes: int = 2,
    val_scenes: int = 0,
    keyframes: int = 10,
    seed: int = 0,
    image_size: tuple[int, int] = (900, 1600),
    sweeps_per_keyframe: int = MAX_SWEEPS,
    version: str | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Write a synthetic city to `out` as a nuScenes dataroot; returns `out`.

    scenes, val_scenes: number of training and validation scenes; they are in different towns.
    sweeps_per_keyframe: LiDAR sweeps at 20 Hz up to and including each keyframe but the first, 1..10.
    image_size: (height, width). version: "v1.0-mini" (up to 8 + 2 scenes) or "v1.0-trainval" (700 + 150); None
    uses the smaller one that has enough scene names. workers: threads, None for one per core; the bytes written do not
    depend on this number. progress: print an estimate and show a bar.

    `out` must not exist or be empty. It is created at the end, when it is complete; until then the files are in a hidden
    folder next to it. Raises ValueError on arguments out of range, and if `out` is not empty.
    """
    out = Path(out)
    _check(out, scenes, val_scenes, keyframes, image_size, sweeps_per_keyframe)
    version, train, val = choose_names(version, scenes, val_scenes)
    plans = plan_scenes(train, val)
    if workers is None:
        workers = os.cpu_count() or 1
    if workers < 1:
        raise ValueError(f"workers is {workers}, it must be at least 1")
    num_shots = sum(1 for _ in plan_shots(keyframes, sweeps_per_keyframe))
    if progress:
        print(_estimate(len(plans), keyframes, num_shots, image_size, workers), file=sys.stderr)

    part = out.parent / f".{out.name}.incomplete-{unique_suffix()}"
    part.mkdir(parents=True)
    try:
        for channel in (*(c.channel for c in CAMERAS), LIDAR_CHANNEL):
            (part / "samples" / channel).mkdir(parents=True)
        (part / "sweeps" / LIDAR_CHANNEL).mkdir(parents=True)
        tables = Tables(seed, image_size)
        with (
            ThreadPoolExecutor(workers) as pool,
            progress_bar(num_shots * len(plans), desc="synthetic city", unit="file", disable=not progress) as bar,
        ):
            # The next scene is planned while this one is filmed: planning is Python, filming are kernels without the GIL.
            def planned(plan: ScenePlan) -> Scene:
                return scene_of(seed, plan, districts[plan.logfile], keyframes)

            districts = {p.logfile: district_of(seed, p.location, p.site) for p in plans}
            for logfile, location in {p.logfile: p.location for p in plans}.items():
                tables.add_log(logfile, location)
            ahead = pool.submit(planned, plans[0])
            for plan, following in zip(plans, [*plans[1:], None], strict=True):
                scene = ahead.result()
                if following is not None:
                    ahead = pool.submit(planned, following)
                stamps = [plan.start_us + k * KEYFRAME_PERIOD_US for k in range(keyframes)]
                tables.add_scene(plan.name, plan.logfile, "synthetic city: " + scene.describe(), stamps)
                film = Film(scene, plan.name, plan.logfile, plan.start_us, seed, part, image_size)
                film.make(tables, keyframes, sweeps_per_keyframe, pool, bar.update)
        for location in dict.fromkeys(p.location for p in plans):
            here = [d for d in districts.values() if d.location == location]
            tables.add_map(location, write_map(part, seed, location, here))
        tables.write(part / version)
        (part / "README.txt").write_text(_README.format(seed=seed, version=version, location=plans[0].location))
        if out.exists():
            out.rmdir()
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out


def _estimate(num_scenes: int, keyframes: int, num_shots: int, image_size: tuple[int, int], workers: int) -> str:
    images = num_scenes * keyframes * len(CAMERAS)
    sweeps = num_scenes * num_shots - images
    pixels = images * image_size[0] * image_size[1]
    megabytes = (pixels * _BYTES_PER_PIXEL + sweeps * NUM_COLUMNS * NUM_RINGS * 20) / 1e6
    seconds = (pixels * _SECONDS_PER_PIXEL + sweeps * _SECONDS_PER_SWEEP) / workers
    return (
        f"synthetic city: {count(num_scenes, 'scene')}, {count(images, 'image')}, {count(sweeps, 'sweep')}; about {megabytes:.0f} MB, "
        f"{seconds:.0f} s with {count(workers, 'worker')} (the first run compiles for another half minute)"
    )

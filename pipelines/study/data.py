"""The study's data: a synthetic city with three splits, and one cache of targets for each teacher."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from occfeat_targets.cache.opening import open_cache
from occfeat_targets.cache.records import write_file
from occfeat_targets.sources.splits import split_scenes
from pipelines.processes import Job, run_jobs
from pipelines.study.design import City

VERSION = "v1.0-trainval"
RANDOM = "random:facebook/dinov2-small"


def make_data(out: Path, city: City, teachers: dict[str, str], *, device: str, tasks: int) -> None:
    """Write the city to out/city and a cache of each teacher to out/cache/NAME, unless they are there.

    teachers: {name: --teacher of a build}. tasks: processes that build the shards of a cache. Everything is resumed.
    """
    root, logs = out / "city", out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    if not root.exists():
        run_jobs([Job("city", (("occfeat_targets", *synth_options(root, city)),), logs / "city.log")], 1)
    splits = root / VERSION / "splits.json"
    if not splits.exists():  # a study may be killed between the two
        scenes = split_scenes()["val"]
        names = {"tune": scenes[: city.tune], "held_out": scenes[city.tune : city.tune + city.test]}
        write_file(splits, json.dumps(names).encode())
    plans, shards = [], []
    for name, teacher in teachers.items():
        for split in city.scenes:
            cache = out / "cache" / name
            if is_built(cache / f"{split}.zarr"):
                continue
            options = ("occfeat_targets", *build_options(root, cache, split, city, teacher, device))
            plans.append(Job(f"plan {name} {split}", ((*options, "--plan-only"),), logs / f"{name}-{split}.log"))
            shards += [
                Job(f"build {name} {split} {k}/{tasks}", ((*options, "--shard", f"{k}/{tasks}"),), logs / f"{name}-{split}-{k}.log")
                for k in range(tasks)
            ]  # fmt: skip
    jobs = min(os.cpu_count() or 1, 16)
    run_jobs(plans, jobs)
    run_jobs(shards, jobs)


def is_built(cache: Path) -> bool:
    """Whether all shards of a cache are finished."""
    return cache.exists() and not open_cache(cache).pending_shards()


def synth_options(root: Path, city: City) -> tuple[str, ...]:
    return (
        "synth", "--out", str(root), "--version", VERSION, "--scenes", str(city.train),
        "--val-scenes", str(city.tune + city.test), "--keyframes", str(city.keyframes), "--sweeps", "1",
        "--image-size", times(city.image_size), "--seed", str(city.seed),
    )  # fmt: skip


def build_options(root: Path, cache: Path, split: str, city: City, teacher: str, device: str) -> tuple[str, ...]:
    return (
        "build", "--dataroot", str(root), "--version", VERSION, "--cache", str(cache), "--split", split,
        "--teacher", teacher, "--teacher-dtype", "float32", "--device", device, "--image-size", times(city.cached),
        "--feature-size", times(city.feature_size), "--grid", times(city.grid), "--range", *map(str, city.bounds),
        "--points",
    )  # fmt: skip


def times(sizes: Iterable[int]) -> str:
    """``8x50x50``."""
    return "x".join(map(str, sizes))

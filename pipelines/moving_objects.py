"""How true is an occupancy that accumulates several LiDAR sweeps? Precision and recall of occupied voxels at the time of the
keyframe, against the synthetic city's geometry at that time, for each treatment of moving objects (build --sweeps, --dynamic).

    python pipelines/moving_objects.py --out moving-city

Truth. A voxel is truly occupied if it contains a surface: rays along both directions of the grid's three axes, 0.25 m apart,
mark the voxels of all surfaces that they meet, also of those behind others. Precision is the share of occupied voxels that
are truly occupied. Recall is the share of the truly occupied voxels that can be seen from the LiDAR at the time of the keyframe
(rays 0.2 degrees apart, to the first surface) that are occupied. The city is written to --out if it is not there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from occfeat_targets.build.assemble import grids_from_ego
from occfeat_targets.cache.geometry import Matrix, inverse_rigid, transform
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.records import unique_suffix, write_file
from occfeat_targets.cache.spec import TargetSpec
from occfeat_targets.common.command_line import reports_errors
from occfeat_targets.common.compiled import compiled
from occfeat_targets.common.plural import count
from occfeat_targets.common.progress import progress_bar
from occfeat_targets.common.terminal import echo
from occfeat_targets.sources.keyframe import Keyframe
from occfeat_targets.sources.nuscenes import NuScenes
from occfeat_targets.synth import write_city
from occfeat_targets.synth.city import district_of, plan_scenes, scene_of
from occfeat_targets.synth.raycast import GROUND, SKY, trace
from occfeat_targets.synth.rig import EGO_FROM_LIDAR, KEYFRAME_PERIOD_US
from occfeat_targets.synth.scene_names import choose_names
from occfeat_targets.synth.world import World
from occfeat_targets.targets.lidar import lidar_arrays

SPACING = 0.25  # [m] between parallel rays
STEP = 0.01  # [m] past a surface before the next one is looked for
REACH = 100.0  # [m] of rays from the LiDAR
ANGLE = np.deg2rad(0.2)  # between rays from the LiDAR
ELEVATIONS = np.deg2rad([-31.0, 11.0])
Mask = NDArray[np.bool_]


@compiled(error_model="numpy")
def cast(starts, directions, length, every, world, cells_from_global, volume):  # type: ignore[no-untyped-def]
    """Mark the voxels of surfaces that rays (n, 3) of unit directions meet: all of each ray down to the ground, or only the first.

    cells_from_global: (3, 4), of (right, forward, up). volume: (Z, H, W) uint8 out, 1 for the ground, 2 for others, or both.
    """
    m = cells_from_global
    for i in range(starts.shape[0]):
        x, y, z = starts[i]
        dx, dy, dz = directions[i]
        left = length
        while left > 0:
            t, hit, _ = trace(x, y, z, dx, dy, dz, left, False, world)
            if hit == SKY:
                break
            x, y, z, left = x + t * dx, y + t * dy, z + t * dz, left - t - STEP
            w = int(np.floor(m[0, 0] * x + m[0, 1] * y + m[0, 2] * z + m[0, 3]))
            h = int(np.floor(m[1, 0] * x + m[1, 1] * y + m[1, 2] * z + m[1, 3]))
            u = int(np.floor(m[2, 0] * x + m[2, 1] * y + m[2, 2] * z + m[2, 3]))
            if 0 <= u < volume.shape[0] and 0 <= h < volume.shape[1] and 0 <= w < volume.shape[2]:
                volume[u, h, w] |= 1 if hit == GROUND else 2
            if not every or hit == GROUND:
                break
            x, y, z = x + STEP * dx, y + STEP * dy, z + STEP * dz


def surfaces(world: World, global_from_grid: Matrix, grid: VoxelGrid) -> tuple[Mask, Mask]:
    """(Z, H, W) voxels with a surface, and those with a surface of the ground."""
    lower, upper = (np.array(bounds[::-1]) for bounds in (grid.lower, grid.upper))
    cells_from_global = grid.cells_from_grid @ inverse_rigid(global_from_grid)
    volume = np.zeros(grid.shape, np.uint8)
    for axis in range(3):
        sides = [a for a in range(3) if a != axis]
        ticks = [np.arange(lower[a] + SPACING / 2, upper[a], SPACING) for a in sides]
        starts = np.zeros((ticks[0].size * ticks[1].size, 3))
        starts[:, sides[0]], starts[:, sides[1]] = (t.ravel() for t in np.meshgrid(*ticks))
        for bound, sign in ((lower, 1.0), (upper, -1.0)):
            starts[:, axis] = bound[axis]
            rays = np.tile(sign * global_from_grid[:3, axis], (len(starts), 1))
            length = upper[axis] - lower[axis]
            cast(transform(global_from_grid, starts), rays, length, True, world, cells_from_global, volume)
    return volume > 0, volume % 2 == 1


def visible(world: World, global_from_lidar: Matrix, global_from_grid: Matrix, grid: VoxelGrid) -> Mask:
    """(Z, H, W) voxels with a surface that is the first on a ray from the LiDAR."""
    azimuth, elevation = np.meshgrid(np.arange(0, 2 * np.pi, ANGLE), np.arange(*ELEVATIONS, ANGLE))
    rays = np.stack([np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)], -1)
    rays = rays.reshape(-1, 3) @ global_from_lidar[:3, :3].T
    starts, volume = np.tile(global_from_lidar[:3, 3], (len(rays), 1)), np.zeros(grid.shape, np.uint8)
    cast(starts, rays, REACH, False, world, grid.cells_from_grid @ inverse_rigid(global_from_grid), volume)
    return volume > 0


def prepare_city(out: Path, *, scenes: int, keyframes: int, sweeps: int, seed: int) -> None:
    """Write the city, or check that the one in `out` is the same, because the truth is computed from its arguments.

    Raises click.ClickException if it is another one, or has fewer sweeps.
    """
    arguments, record = {"scenes": scenes, "keyframes": keyframes, "sweeps": sweeps, "seed": seed}, "city.json"
    if not out.exists() or not any(out.iterdir()):
        made = out.with_name(f".{out.name}.{unique_suffix()}")
        write_city(made, scenes=scenes, keyframes=keyframes, seed=seed, image_size=(32, 64), sweeps_per_keyframe=sweeps)
        write_file(made / record, json.dumps(arguments).encode())
        made.replace(out)
    found = json.loads((out / record).read_text()) if (out / record).exists() else {}
    if {**found, "sweeps": sweeps} != arguments or found["sweeps"] < sweeps:
        raise click.ClickException(
            f"the city in {out} is {found or 'not one of this command'}, expected {arguments}: choose another --out, or delete it"
        )


def keyframes_with_worlds(
    root: Path, scenes: int, keyframes: int, seed: int, sweeps: int
) -> Iterator[tuple[Keyframe, World]]:
    """Keyframes with all sweeps, and the world at their time."""
    version, names, _ = choose_names(None, scenes, 0)
    split = NuScenes().read_split(
        root, "mini_train" if version == "v1.0-mini" else "train", version=version, num_sweeps=sweeps, with_boxes=False, with_tracks=True,
    )  # fmt: skip
    plans = {plan.name: plan for plan in plan_scenes(names, [])}
    made = {}
    for keyframe in split.keyframes:
        plan = plans[keyframe.scene]
        if plan.name not in made:
            made[plan.name] = scene_of(seed, plan, district_of(seed, plan.location, plan.site), keyframes)
        scene = made[plan.name]
        if len(keyframe.sweeps) == sweeps:
            seconds = (keyframe.timestamp_us - plan.start_us) * 1e-6
            assert (keyframe.timestamp_us - plan.start_us) % KEYFRAME_PERIOD_US == 0
            yield keyframe, scene.world(seconds)


def cases(most: int) -> Iterator[TargetSpec]:
    yield TargetSpec(labels=())
    for n in (5, 10):
        if n <= most:
            for dynamic in ("smear", "carve", "boxes"):
                yield TargetSpec(labels=(), num_sweeps=n, dynamic=dynamic)


def print_table(specs: list[TargetSpec], counts: NDArray[np.int64], number: int, scenes: int) -> None:
    echo(
        f"\nSIMULATED: a synthetic city. {count(number, 'keyframe')} of {count(scenes, 'scene')}, grid {specs[0].grid}\n"
    )
    echo(
        "| sweeps | moving objects | precision | recall | F1 | precision above ground | recall above ground | F1 above ground |"
    )
    echo("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for spec, row in zip(specs, counts, strict=True):
        texts = []
        for occupied, right, seen, found in row.tolist():
            precision, recall = right / occupied, found / seen
            texts += [f"{100 * v:.1f}" for v in (precision, recall, 2 * precision * recall / (precision + recall))]
        name = spec.dynamic if spec.num_sweeps > 1 else "-"
        echo(f"| {spec.num_sweeps} | {name} | {' | '.join(texts)} |")


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the city.")
@click.option("--scenes", default=4)
@click.option("--keyframes", default=6, help="Of each scene; the first has no earlier sweeps and is left out.")
@click.option("--sweeps", default=10, help="Largest number of sweeps.")
@click.option("--seed", default=0)
@reports_errors("targets")
def main(out: Path, scenes: int, keyframes: int, sweeps: int, seed: int) -> None:
    prepare_city(out, scenes=scenes, keyframes=keyframes, sweeps=sweeps, seed=seed)
    source, specs = NuScenes(), list(cases(sweeps))
    # {case: [with, without voxels of the ground]} of occupied, right, truly occupied and visible, found
    counts = np.zeros((len(specs), 2, 4), np.int64)
    number = 0
    with progress_bar(scenes * (keyframes - 1), unit="keyframe") as bar:
        for keyframe, world in keyframes_with_worlds(out, scenes, keyframes, seed, sweeps):
            (grid_from_ego,) = grids_from_ego(keyframe, specs[0])
            global_from_grid = keyframe.global_from_ego @ inverse_rigid(grid_from_ego)
            grid = specs[0].grid
            true, ground = surfaces(world, global_from_grid, grid)
            seen = true & visible(world, keyframe.global_from_ego @ EGO_FROM_LIDAR, global_from_grid, grid)
            returns = [source.read_sweep(sweep.path) for sweep in keyframe.sweeps]
            for row, spec in zip(counts, specs, strict=True):
                some = replace(keyframe, sweeps=keyframe.sweeps[: spec.num_sweeps])
                arrays = lidar_arrays(some, returns[: spec.num_sweeps], spec, grid_from_ego[None])
                occupied = grid.unpack_volume(arrays["occupancy"][0])
                for column, among in enumerate((np.ones_like(ground), ~ground)):
                    volumes = occupied, occupied & true, seen, occupied & seen
                    row[column] += [int((volume & among).sum()) for volume in volumes]
            number += 1
            bar.update()
    print_table(specs, counts, number, scenes)


if __name__ == "__main__":
    main()

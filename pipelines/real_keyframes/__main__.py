"""One network fitted to one real keyframe, and tested on another that it has never seen.

    python -m pipelines.real_keyframes --dataroot NUSCENES --teacher FOLDER --out DIR

Builds the caches of one training and one validation scene, pretrains on the first until it fits, measures occupancy and features on the second beside what
needs no image, changes every transform on purpose, and draws the paper's Figures 5 and 6. Two keyframes say nothing about
how well OccFeat works; they show that images, LiDAR and calibration of real data are put together correctly. An interrupted
run continues.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from occfeat_targets.cache.geometry import inverse_rigid, transform
from occfeat_targets.common.command_line import reports_errors
from occfeat_targets.pictures.birdseye import BODY_HEIGHT
from occfeat_train.report.correlation import voxels_of
from pipelines.real_keyframes.fitting import Pair, Settings, build, call, pretrain, settle
from pipelines.real_keyframes.tables import feature_rows, occupancy_rows, report, transform_rows

SECONDS_PER_STEP = 1.5  # of the default network on one idle core


def draw(settings: Settings, pair: Pair) -> None:
    """The paper's Figures 5 and 6: correlation maps of the nearest voxel of a vehicle's body, and of the mean of all vehicles."""
    found = pair.train[0]
    is_vehicle = voxels_of("vehicles", found)
    centers = found.grid.centers_of(found.predicted.voxels).astype(np.float64)
    height = transform(inverse_rigid(found.grid_from_ego), centers)[:, 2]
    body = centers[is_vehicle & (height > BODY_HEIGHT[0]) & (height < BODY_HEIGHT[1])]
    queries: list[object] = ["--of", "vehicles"] if is_vehicle.any() else []
    if len(body):
        nearest = body[np.linalg.norm(body, axis=1).argmin()]
        queries += ["--voxel", ",".join(f"{value:g}" for value in np.round(nearest, 3))]
    call(
        "figures", settings.settled, "--cache", settings.cache, "--split", settings.val[0], "--fit-split", settings.train[0],
        "--fit-on", settings.train[1], "--samples", 1, "--out", settings.out / "figures", "--device", "cpu", *queries,
    )  # fmt: skip


def study(settings: Settings) -> dict[str, Any]:
    """Everything; the results are written to OUT/results.json and OUT/results.md."""
    began = time.perf_counter()
    click.echo(
        f"2 caches of 5 MB: about 20 s; {settings.steps} steps of about {SECONDS_PER_STEP} s on an idle core: "
        f"{settings.steps * SECONDS_PER_STEP / 60:.0f} minutes; measures and pictures: 1 minute"
    )
    build(settings)
    pretrain(settings)
    settle(settings)
    pair = Pair.load(settings)
    teacher = pair.train[0].reader.cache.spec.teacher
    assert teacher is not None
    results = {
        "teacher": f"{teacher.name} ({teacher.digest})",
        "occupancy": occupancy_rows(pair),
        "features": feature_rows(pair),
        "transforms": transform_rows(pair),
    }
    (settings.out / "results.json").write_text(json.dumps(results, indent=1))
    text = report(settings, results)
    (settings.out / "results.md").write_text(text + "\n")
    draw(settings, pair)
    click.echo(
        f"\n{text}\n\npictures: {settings.out / 'figures' / 'index.html'}; {(time.perf_counter() - began) / 60:.0f} minutes"
    )
    return results


@click.command(help=__doc__)
@click.option(
    "--dataroot",
    type=click.Path(path_type=Path, exists=True),
    required=True,
    help="nuScenes dataroot with both scenes.",
)
@click.option("--teacher", required=True, help="Folder of the teacher.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("real-keyframes"), show_default=True)
@click.option("--steps", default=500, show_default=True)
@reports_errors("targets,train")
def main(dataroot: Path, teacher: str, out: Path, steps: int) -> None:
    study(Settings(dataroot.resolve(), teacher, out.resolve(), steps=steps))


if __name__ == "__main__":
    main()

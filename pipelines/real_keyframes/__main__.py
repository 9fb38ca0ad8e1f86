"""One network fitted to one real keyframe, and tested on another that it has never seen.

    python -m pipelines.real_keyframes --dataroot NUSCENES --teacher FOLDER --out DIR

Builds the caches of one training and one validation scene, pretrains on the first until it fits, measures occupancy and features on the second beside what
needs no image, changes every transform on purpose, and draws the paper's Figures 5 and 6. Two keyframes say nothing about
how well OccFeat works; they show that images, LiDAR and calibration of real data are put together correctly. An interrupted
run continues.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

import occfeat_targets
from occfeat_targets.cache.geometry import inverse_rigid, transform
from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.pictures.birdseye import BODY_HEIGHT
from occfeat_targets.pictures.page import read_returns
from occfeat_train.data.dataset import KeyframeDataset
from occfeat_train.distributed import Process
from occfeat_train.report.correlation import directions, voxels_of
from occfeat_train.report.voxel_predictions import VoxelPredictions, predict_voxels
from occfeat_train.tasks.pretraining import Pretraining
from occfeat_train.training.checkpoint import find_checkpoint, save_checkpoint
from occfeat_train.training.initial import restore
from pipelines.real_keyframes.priors import features_by_place, iou, mean_cosine, occupancy_by_place
from pipelines.real_keyframes.transforms import (
    CHANGES,
    agreement,
    measure_edges,
    measure_network,
    read_rig,
    shift,
)

SECONDS_PER_STEP = 1.5  # of the default network on one idle core
FITS = {"iou": 80.0, "cosine": 0.95}  # on the training keyframe
CPU = Process(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class Settings:
    """train, val: (split, scene). build: more options of `occfeat_targets.build_cache`. overrides: fields of the network's config."""

    dataroot: Path
    teacher: str
    out: Path
    train: tuple[str, str] = ("train", "scene-0061")
    val: tuple[str, str] = ("val", "scene-0003")
    version: str | None = None
    steps: int = 500
    build: dict[str, Any] | None = None
    overrides: tuple[str, ...] = ("network.image_size=128x224", "network.channels=64", "optim.lr=2e-3")

    @property
    def cache(self) -> Path:
        return self.out / "cache"

    @property
    def run(self) -> Path:
        return self.out / "run"

    @property
    def settled(self) -> Path:
        return self.out / "settled"


def build(settings: Settings) -> None:
    """The caches of both scenes; finished ones are not built again."""
    for split, scene in (settings.train, settings.val):
        occfeat_targets.build_cache(
            settings.dataroot, settings.cache, split, version=settings.version, scenes=[scene], teacher=settings.teacher,
            workers=0, **settings.build or {},
        )  # fmt: skip


def pretrain(settings: Settings) -> None:
    """Without augmentation and with lambda = 1, so that both losses fit one keyframe in few steps."""
    samples = int(CacheReader(settings.cache / f"{settings.train[0]}.zarr").is_valid.sum())
    plain = ("resize=[1,1]", "crop=0", "flip_images=false", "flip_bev=false", "shuffle_cameras=false")
    overrides = [
        "optim.schedule=onecycle",
        *settings.overrides,
        *(f"augment.{field}" for field in plain),
        "network.drop_connect=0",
    ]
    call(
        "pretrain", "--cache", settings.cache, "--split", settings.train[0], "--preset", "small/occfeat", "--lambda", 1,
        "--batch", 1, "--epochs", repr((settings.steps + 0.5) / samples), "--save-every", 50, "--no-tensorboard",
        "--loader-threads", 1, "--device", "cpu", "--out", settings.run, *(f"--set={text}" for text in overrides),
    )  # fmt: skip


@torch.no_grad()
def settle(settings: Settings) -> None:
    """Write the trained network to settings.settled, with BatchNorm statistics of the training scene.

    The running statistics follow the weights with a time constant of 100 steps, as the encoder's of EfficientNet do, and these weights
    change from one step to the next: 400 steps gave an occupancy IoU of 30 % with the running statistics, and of 78 % with these.
    """
    checkpoint = find_checkpoint(settings.run)
    task = restore(checkpoint)
    reader = CacheReader(settings.cache / f"{settings.train[0]}.zarr")
    dataset = KeyframeDataset(reader, checkpoint.info.config, training=False)
    for module in task.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the mean over all forward passes
    task.train()
    for keyframe in dataset.keyframes.tolist():
        task(dataset.batch([(0, keyframe)]))
    save_checkpoint(settings.settled, checkpoint.step, checkpoint.info, task.state_dict(), checkpoint.trainer_state())


def call(*arguments: object) -> None:
    """Run occfeat-train. Raises ClickException if it fails."""
    done = subprocess.run([sys.executable, "-m", "occfeat_train", *map(str, arguments)], check=False)
    if done.returncode:
        raise click.ClickException(
            f"occfeat-train {arguments[0]} exited with {done.returncode}: run the same command again to continue"
        )


@dataclass(frozen=True, eq=False)
class Pair:
    """The trained network's predictions for all keyframes of both scenes."""

    task: Pretraining
    datasets: tuple[KeyframeDataset, KeyframeDataset]
    train: list[VoxelPredictions]
    val: list[VoxelPredictions]

    @classmethod
    def load(cls, settings: Settings) -> Pair:
        checkpoint = find_checkpoint(settings.settled)
        task = restore(checkpoint)
        assert isinstance(task, Pretraining)
        readers = [CacheReader(settings.cache / f"{split}.zarr") for split, _ in (settings.train, settings.val)]
        datasets = [KeyframeDataset(reader, checkpoint.info.config, training=False) for reader in readers]
        found = [[predict_voxels(task, data, int(k), CPU) for k in data.keyframes] for data in datasets]
        return cls(task, (datasets[0], datasets[1]), *found)


def occupancy_rows(pair: Pair) -> dict[str, tuple[float, float]]:
    """{prediction: IoU [%] on the training scene, on the other}."""
    grid, truths = pair.train[0].grid, [[each.true for each in found] for found in (pair.train, pair.val)]
    copied, by_place = truths[0][0], occupancy_by_place(truths[0], grid)
    guesses = {"the network": [[each.guess for each in found] for found in (pair.train, pair.val)]}
    for name, guess in (
        ("the training keyframe's own occupancy", copied),
        ("the rate of the place: height and distance", by_place),
    ):
        guesses[name] = [[guess] * len(found) for found in truths]
    return {name: (iou(a, truths[0]), iou(b, truths[1])) for name, (a, b) in guesses.items()}  # type: ignore[arg-type]


def feature_rows(pair: Pair) -> dict[str, tuple[float, ...]]:
    """{prediction: mean cosine to the targets of the training scene and of the other, and the same after subtracting the training targets' mean}."""
    voxels, target = (
        [np.concatenate([getattr(each.target, name) for each in found]) for found in (pair.train, pair.val)]
        for name in ("voxels", "features")
    )
    unit = [directions(values) for values in target]
    mean = unit[0].mean(axis=0)
    predicted = [
        directions(np.concatenate([each.predicted.features for each in found])) for found in (pair.train, pair.val)
    ]
    grid = pair.train[0].grid
    rows = {
        "the network": predicted,
        "the mean of the training targets": [np.broadcast_to(mean, values.shape) for values in unit],
        "the best fixed vector of that scene": [np.broadcast_to(values.mean(axis=0), values.shape) for values in unit],
        "the training targets' mean at the place: height and distance": [
            features_by_place(voxels[0], unit[0], at, grid) for at in voxels
        ],
    }
    return {
        name: tuple(mean_cosine(a - shift, b - shift) for shift in (0, mean) for a, b in zip(values, unit, strict=True))
        for name, values in rows.items()
    }


def transform_rows(pair: Pair) -> dict[str, dict[str, float]]:
    """{change of the transforms: {measure: value}} on the first keyframe of each scene."""
    firsts = (pair.train[0], pair.val[0])
    rigs = [read_rig(data, found.keyframe) for data, found in zip(pair.datasets, firsts, strict=True)]
    returns = [read_returns(each.reader.cache, [each.keyframe], None)[each.keyframe] for each in firsts]
    rows = {}
    for name, change in CHANGES.items():
        changed = [change(rig) for rig in rigs]
        edges = [measure_edges(*given) for given in zip(firsts, changed, returns, strict=True)]
        network = [measure_network(pair.task, *given) for given in zip(pair.datasets, firsts, changed, strict=True)]
        rows[name] = {
            "shift": shift(firsts[0], rigs[0], changed[0]),
            "train_edges": edges[0],
            "val_edges": edges[1],
            "agreement": float(np.mean([agreement(*given) for given in zip(firsts, changed, strict=True)])),
            **{f"train_{key}": value for key, value in network[0].items()},
            **{f"val_{key}": value for key, value in network[1].items()},
        }
    return rows


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


def report(settings: Settings, results: dict[str, Any]) -> str:
    """The results as Markdown."""
    (train, val), occupancy, features = (settings.train[1], settings.val[1]), results["occupancy"], results["features"]
    iou_here, cosine_here = occupancy["the network"][0], features["the network"][0]
    fits = iou_here >= FITS["iou"] and cosine_here >= FITS["cosine"]
    lines = [
        f"Teacher {results['teacher']}. The network {'fits' if fits else 'DOES NOT FIT'} {train}: occupancy IoU {iou_here:.1f} % (at least "
        f"{FITS['iou']:g} expected), mean cosine {cosine_here:.3f} (at least {FITS['cosine']:g}).",
        f"Two keyframes say nothing about the IoU that OccFeat reaches; {val} is there to test the transforms.",
        "",
        f"| occupancy IoU [%] | {train} | {val}, never seen |",
        "|---|---|---|",
        *(f"| {name} | {a:.1f} | {b:.1f} |" for name, (a, b) in occupancy.items()),
        "",
        f"| mean cosine to the targets | {train} | {val} | {train}, centred | {val}, centred |",
        "|---|---|---|---|---|",
        *(f"| {name} | {' | '.join(f'{value:.3f}' for value in values)} |" for name, values in features.items()),
        "",
        "Centred: after subtracting the mean of the training targets from both, so 0 is no better than that mean.",
        "",
        f"| transforms | shift [px] | edges, {train} | edges, {val} | agreement of cameras | network on {train}: IoU, cosine | on {val}: IoU, cosine |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in results["transforms"].items():
        networks = [f"{row[f'{which}_iou']:.1f}, {row[f'{which}_cosine']:.3f}" for which in ("train", "val")]
        lines.append(
            f"| {name} | {row['shift']:.1f} | {row['train_edges']:.3f} | {row['val_edges']:.3f} | {row['agreement']:.2f} | {' | '.join(networks)} |"
        )
    return "\n".join(lines)


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
def main(dataroot: Path, teacher: str, out: Path, steps: int) -> None:
    study(Settings(dataroot.resolve(), teacher, out.resolve(), steps=steps))


if __name__ == "__main__":
    main()

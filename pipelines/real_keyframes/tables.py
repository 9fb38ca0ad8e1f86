"""Tables of the fitted network: occupancy, features, wrong transforms, each beside what needs no network."""

from __future__ import annotations

from typing import Any

import numpy as np

from occfeat_targets.pictures.colors import directions
from occfeat_targets.pictures.page import read_returns
from pipelines.real_keyframes.fitting import Pair, Settings
from pipelines.real_keyframes.priors import features_by_place, iou, mean_cosine, occupancy_by_place
from pipelines.real_keyframes.transforms import CHANGES, agreement, measure_edges, measure_network, read_rig, shift

FITS = {"iou": 80.0, "cosine": 0.95}  # on the training keyframe


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

"""`occfeat-targets probe`: ridge regressions from inputs of voxels to the classes of their cells, and how well they rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.cache.labels import LABEL_KINDS
from occfeat_targets.cache.reader import CacheReader, frame_index
from occfeat_targets.common.plural import count
from occfeat_targets.common.progress import progress_bar
from occfeat_targets.probe.halves import Half, choose_halves
from occfeat_targets.probe.inputs import BASELINES, INPUTS, TEACHER, inputs_of
from occfeat_targets.probe.ranking import Ranking
from occfeat_targets.probe.result import ClassResult, HalfSummary, Interval, ProbeResult
from occfeat_targets.probe.ridge import Ridge
from occfeat_targets.probe.voxels import Voxels, read_voxels

MAX_VOXELS = 100_000  # of a half; more scenes help, more voxels of the same scenes do not
MIN_SCENES = 5  # for an interval
DRAWS, LEVEL = 1000, 0.95  # of the bootstrap


def probe_cache(
    train: CacheReader,
    test: CacheReader | None = None,
    *,
    samples: int = 100,
    seed: int = 0,
    frame: str | None = None,
    print_line: Callable[[str], None] | None = None,
    progress: bool = True,
) -> ProbeResult:
    """Area under the ROC curve of linear probes from the target features of occupied voxels to the labels of their cells.

    A probe is a ridge regression on the standardised inputs of a voxel, fitted to some scenes and tested on others. Its strength
    is cross-validated within the scenes that it is fitted to. The same is done for inputs without a teacher.

    train, test: caches of the two halves, built with the same options; without `test`, half of the scenes of `train` are
    tested. samples: largest number of keyframes of each half. seed: of the choice of scenes, keyframes and voxels. frame:
    reference frame of the grid; the cache's first by default. print_line: is told what is read.

    Raises ValueError and CacheError as `choose_halves` and `read_voxels`, and if no camera sees an occupied voxel.
    """
    halves = choose_halves(train, test, samples=samples, seed=seed, frame=frame)
    if print_line is not None:
        print_line(_describe(halves))
    index = frame_index(train.cache, frame)
    with progress_bar(
        sum(len(half.keyframes) for half in halves), unit="keyframe", desc="read", disable=not progress
    ) as bar:
        voxels = [_read(half, index, (seed, number), bar) for number, half in enumerate(halves)]
    group, folds = _fold_groups(voxels[0])
    scenes, scene = np.unique(voxels[1].scene, return_inverse=True)
    draws = np.random.default_rng(seed).multinomial(len(scenes), np.full(len(scenes), 1 / len(scenes)), DRAWS)
    inputs = [inputs_of(half) for half in voxels]
    results: list[ClassResult] = []
    areas: dict[str, list[NDArray[np.float64]]] = {name: [] for name in INPUTS}  # of the draws, for each class
    kinds = train.cache.spec.labels
    with progress_bar(len(kinds) * len(INPUTS), unit="probe", desc="fit", disable=not progress) as bar:
        for kind in kinds:
            for result, rankings in _probe_kind(kind, voxels, inputs, group, scene.reshape(-1), draws, bar):
                results.append(result)
                for name, ranking in rankings.items():
                    areas[name].append(ranking.resample(draws))
    probed = [result for result in results if result.reason is None]
    mean = {name: float(np.mean([result.auc[name] for result in probed])) for name in INPUTS if probed}
    baseline = max(BASELINES, key=mean.__getitem__) if probed else None
    interval = None
    if baseline is not None and any(result.interval for result in probed):
        interval = _interval(_nanmean(np.stack(areas[TEACHER]) - np.stack(areas[baseline])))
    teacher = train.cache.spec.teacher
    assert teacher is not None  # choose_halves refuses caches without
    return ProbeResult(
        teacher=teacher.name, digest=teacher.digest, frame=train.cache.spec.frames[index], seed=seed,
        warnings=tuple(dict.fromkeys(line for half in halves for line in half.reader.cache.warnings)),
        train=_summary(halves[0], voxels[0]), test=_summary(halves[1], voxels[1]), folds=folds, classes=tuple(results),
        mean=mean, baseline=baseline, difference=None if baseline is None else mean[TEACHER] - mean[baseline],
        difference_interval=interval,
    )  # fmt: skip


def _describe(halves: tuple[Half, Half]) -> str:
    parts = [
        f"{count(len(half.keyframes), 'keyframe')} of {count(half.num_scenes, 'scene')} of {half.reader.cache.path}"
        for half in halves
    ]
    names = ("features", "images")
    size = sum(array.nbytes for array in halves[0].reader.cache.spec.arrays() if array.name in names)
    total = size * sum(len(half.keyframes) for half in halves) / 1e6
    return f"fits probes to {parts[0]}, tests them on {parts[1]}; reads {total:,.0f} MB of features and images"


def _read(half: Half, index: int, seed: tuple[int, int], bar: Any) -> Voxels:
    most = -(-MAX_VOXELS // len(half.keyframes))
    parts = []
    for keyframe in half.keyframes:
        parts.append(read_voxels(half.reader, keyframe, index, most, np.random.default_rng((*seed, keyframe))))
        bar.update()
    voxels = Voxels.concatenate(parts)
    if not len(voxels):
        raise ValueError(
            f"no camera sees an occupied voxel in {count(len(half.keyframes), 'keyframe')} of {half.reader.cache.path}: "
            "'occfeat-targets preview' shows voxels in the images"
        )
    return voxels


def _fold_groups(voxels: Voxels) -> tuple[NDArray[Any], str]:
    """(n,) groups that a fold keeps together, and what they are: scenes; of one scene, keyframes; of one keyframe, quadrants."""
    if len(np.unique(voxels.scene)) > 1:
        return voxels.scene, "scenes"
    if len(np.unique(voxels.keyframe)) > 1:
        return voxels.keyframe, "keyframes of one scene"
    return (voxels.centers[:, 0] > 0) * 2 + (voxels.centers[:, 1] > 0), "quadrants of one keyframe"


def _probe_kind(
    kind: str,
    voxels: list[Voxels],
    inputs: list[dict[str, NDArray[np.float32]]],
    group: NDArray[Any],
    scene: NDArray[np.intp],
    draws: NDArray[np.integer[Any]],
    bar: Any,
) -> list[tuple[ClassResult, dict[str, Ranking]]]:
    """The result of every class of one kind of labels, and {input: its ranking of the test half by scene}."""
    valid = [half.is_valid[kind] for half in voxels]
    labels = [half.labels[kind][rows] for half, rows in zip(voxels, valid, strict=True)]
    names = LABEL_KINDS[kind].classes
    counts = [[(int(half[:, k].sum()), len(half)) for half in labels] for k in range(len(names))]
    reasons = [_why_not(*both) for both in counts]
    probed = [k for k, reason in enumerate(reasons) if reason is None]
    rankings: list[dict[str, Ranking]] = [{} for _ in names]
    strengths: list[dict[str, float]] = [{} for _ in names]
    for source in INPUTS:
        if probed:
            train, test = (half[source][rows] for half, rows in zip(inputs, valid, strict=True))
            ridge = Ridge.fit(train, labels[0][:, probed], group[valid[0]])
            scores = ridge.predict(test)
            for k, column, strength in zip(probed, scores.T, ridge.strengths, strict=True):
                rankings[k][source] = Ranking.of(column, labels[1][:, k], scene[valid[1]], draws.shape[1])
                strengths[k][source] = float(strength)
        bar.update()
    return [
        (
            ClassResult(
                name=name, kind=kind, train=train, test=test, reason=reason, strength=strength,
                auc={source: ranking.area for source, ranking in ranked.items()},
                interval={
                    source: _interval(ranking.resample(draws)) for source, ranking in ranked.items()
                    if np.count_nonzero(ranking.positives) >= MIN_SCENES
                },
            ),
            ranked,
        )
        for name, (train, test), reason, strength, ranked in zip(names, counts, reasons, strengths, rankings, strict=True)
    ]  # fmt: skip


def _why_not(train: tuple[int, int], test: tuple[int, int]) -> str | None:
    """Why a class cannot be probed. train, test: numbers of its voxels and of all."""
    for (positives, total), half in ((train, "training"), (test, "test")):
        if not total:
            return f"no valid voxels in the {half} half"
        if positives in (0, total):
            return f"{'no' if not positives else 'only'} voxels of this class in the {half} half"
    return None


def _nanmean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(classes, B) -> (B,), without the classes that a draw lacks."""
    counted = ~np.isnan(values)
    total, number = np.where(counted, values, 0).sum(0), counted.sum(0)
    return np.divide(total, number, out=np.full(len(total), np.nan), where=number > 0)


def _interval(values: NDArray[np.float64]) -> Interval:
    low, high = np.nanquantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _summary(half: Half, voxels: Voxels) -> HalfSummary:
    return HalfSummary(str(half.reader.cache.path), half.num_scenes, len(half.keyframes), len(voxels))

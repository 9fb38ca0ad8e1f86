"""The result of a probe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

Interval = tuple[float, float]


@dataclass(frozen=True)
class HalfSummary:
    """path: of the cache. Numbers of scenes, keyframes and voxels."""

    path: str
    scenes: int
    keyframes: int
    voxels: int


@dataclass(frozen=True)
class ClassResult:
    """How well each input separates one class from all other voxels.

    train, test: numbers of positive voxels and of all valid ones, in each half.
    auc, interval, strength: {input: value}. Area under the ROC curve in the test half; its 95 % interval over scenes, empty if
    too few scenes have positives; strength of the ridge regression. Empty if the class cannot be probed, with the reason.
    """

    name: str
    kind: str
    train: tuple[int, int]
    test: tuple[int, int]
    auc: Mapping[str, float]
    interval: Mapping[str, Interval]
    strength: Mapping[str, float]
    reason: str | None = None


@dataclass(frozen=True)
class ProbeResult:
    """warnings: of simulated parts. folds: groups over which the strength was cross-validated.

    mean: {input: mean area over the classes that could be probed}; empty if no class could be. baseline: the input without a
    teacher with the largest mean. difference: mean area of the teacher's features less the baseline's, and its 95 % interval
    over test scenes, if there are enough.
    """

    teacher: str
    digest: str
    frame: str
    seed: int
    warnings: tuple[str, ...]
    train: HalfSummary
    test: HalfSummary
    folds: str
    classes: tuple[ClassResult, ...]
    mean: Mapping[str, float]
    baseline: str | None
    difference: float | None
    difference_interval: Interval | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

"""Differences of a run from the paper: every field in which its config, targets and data differ from a row.

All fields are compared except those listed here with a reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from occfeat_targets.cache.spec import TargetSpec, TeacherSpec
from occfeat_train.config import Config
from occfeat_train.label_rule import LABEL_CHOICE, LabelScenesConfig
from occfeat_train.networks.encoder_weights import DEFAULT_WEIGHTS
from occfeat_train.presets import PRESETS
from occfeat_train.training.checkpoint import RunInfo

TARGETS = TargetSpec(teacher=TeacherSpec("facebook/dinov2-small", "", (224, 392), 14, 384))
DATA = {
    "version": "v1.0-trainval", "split": "train", "keyframes": 28_130, "label scenes": LabelScenesConfig().describe(),
    "simulated": "nothing", "caches": 1,
}  # fmt: skip
EVALUATION_DATA = {"version": "v1.0-trainval", "split": "val", "keyframes": 6_019}
# Details of the computation that the paper does not specify. Whether images were enlarged is computed from the cache, and
# the teacher is compared as the cache's.
COMPUTING = {"network.recompute", "precision", "compile", "seed", "allow_upsampling", "teacher"}
# The label scenes are compared as a list.
NOT_COMPARED = {*COMPUTING, *LABEL_CHOICE}
LISTED = "from a list"  # label scenes of --scenes
# Fields of a cache that do not change the method: which arrays exist, how they were computed, and the size of its images.
STORAGE = {
    "format_version",
    "labels",
    "frames",
    "image_size",
    "teacher.digest",
    "teacher.dtype",
    "max_points",
    "rays",
    "instances",
}
TEACHERS = "teacher."  # prefix of fields that only pretraining uses


@dataclass(frozen=True)
class Difference:
    """field: dotted name. here, paper: the two values as text."""

    field: str
    here: str
    paper: str


def nearest_row(info: RunInfo) -> str:
    """Name of the paper's preset of the same task and label share with the fewest differences from a run; its own preset wins ties.

    A task that the paper does not have differs in `task`.
    `--occ-only` or `--lambda 0.1` with the default preset is therefore compared with the row of that name.
    """
    rows = [name for name in PRESETS if name.startswith("table")]

    def distance(name: str) -> tuple[bool, bool, int, bool]:
        row = PRESETS[name]
        return (
            row.task != info.config.task,
            row.labels != info.config.labels,
            len(_config_differences(info.config, row)),
            name != info.preset,
        )

    return min(rows, key=distance)


def differences(info: RunInfo) -> list[Difference]:
    """Differences of a run from `nearest_row`, and of the runs whose weights it started from."""
    config = info.config
    found = _config_differences(config, PRESETS[nearest_row(info)])
    for targets in (info.targets, *info.more_targets):
        found += [each for each in _of_targets(info, targets) if each not in found]
    data = {**info.data, "label scenes": _label_scenes(info)}
    found += _compare({f"data.{name}": value for name, value in data.items()}, {f"data.{name}": value for name, value in DATA.items()})  # fmt: skip
    for targets in (info.targets, *info.more_targets):
        found += [each for each in _upsampling(config, targets) if each not in found]
    if info.parent is not None:
        kind = info.parent.config.task
        if config.is_pretext or not info.parent.config.is_pretext:
            found.append(Difference("initial weights", f"a run of {kind}", "a pretraining, or the backbone's"))
        found += [replace(other, field=f"{kind}: {other.field}") for other in differences(info.parent)]
    return found


def _of_targets(info: RunInfo, targets: Mapping[str, Any]) -> list[Difference]:
    """Of a cache's spec."""
    config, paper = info.config, _flat(TARGETS.to_dict())
    reads_teacher = config.is_pretext and "features" in config.task_class.arrays(config, TargetSpec.from_dict(targets))
    left_out = STORAGE | {name for name in paper if name.startswith(TEACHERS) and not reads_teacher}
    here = _flat({"grid": info.grid.to_dict(), **targets})
    return _compare(
        {f"targets.{name}": value for name, value in here.items() if name not in left_out},
        {f"targets.{name}": value for name, value in paper.items()},
    )


def _upsampling(config: Config, targets: Mapping[str, Any]) -> list[Difference]:
    if "image_size" not in targets:
        return []
    cached, largest = targets["image_size"], config.augment.largest(config.network.image_size)
    if all(n <= given for n, given in zip(largest, cached, strict=True)):
        return []
    return [Difference("upsampling", f"from {_text(cached)} to up to {_text(largest)} pixels", "none")]


def evaluation_differences(data: Mapping[str, Any]) -> list[Difference]:
    """Differences of the evaluation data from the paper's; see `Cache.provenance`."""
    return _compare({f"measured on: {n}": v for n, v in data.items()}, {f"measured on: {n}": v for n, v in EVALUATION_DATA.items()})  # fmt: skip


def describe_data(provenance: Mapping[str, Any], keyframes: int) -> dict[str, Any]:
    """The data that a cache was built from, as far as it is recorded."""
    named = {name: provenance[name] for name in ("version", "split") if name in provenance}
    return {**named, "keyframes": keyframes}


def describe_mixture(data: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The data of all caches that a run is trained on, each from `describe_data`."""
    if len(data) == 1:
        return dict(data[0])
    named = {
        name: " and ".join(dict.fromkeys(str(d[name]) for d in data if name in d)) for name in ("version", "split")
    }
    there = {name: text for name, text in named.items() if text}
    return {**there, "keyframes": sum(d["keyframes"] for d in data), "caches": len(data)}


def _label_scenes(info: RunInfo) -> str:
    """How the label scenes were chosen; as in the paper's group if all scenes are used, or no labels."""
    if info.data.get("label scenes") == LISTED:
        return LISTED
    return info.config.label_scenes.describe() if info.config.uses_label_share else str(DATA["label scenes"])


def _config_differences(config: Config, row: Config) -> list[Difference]:
    row = replace(row, frame="auto" if config.frame == "auto" else "cameras")  # the paper uses Simple-BEV's frames
    here, paper = (
        {name: value for name, value in each.flat().items() if name not in NOT_COMPARED} for each in (config, row)
    )
    for each in (here, paper):
        if each["network.weights"] == DEFAULT_WEIGHTS[each["network.backbone"]]:
            each["network.weights"] = "default"
    return _compare(here, paper)


def _compare(here: Mapping[str, Any], paper: Mapping[str, Any]) -> list[Difference]:
    return [
        Difference(name, _text(value), _text(paper[name]))
        for name, value in here.items()
        if name in paper and _text(value) != _text(paper[name])
    ]


def _flat(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a spec with dotted names. A local folder is not compared: it may hold any weights, whatever its name."""
    out: dict[str, Any] = {}
    for name, value in spec.items():
        out |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {name: value}
    teacher = str(out.get("teacher.name", ""))
    if Path(teacher).is_absolute():
        out["teacher.name"] = f"local folder {Path(teacher).name}, weights not compared"
    return out


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ("x" if all(isinstance(v, int) for v in value) else ", ").join(_text(v) for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)

"""Refusal of caches of another format, with the command that builds them again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from occfeat_targets.cache.records import CacheError
from occfeat_targets.cache.spec import EGO_FRAME, FORMAT_VERSION, LATER, TargetSpec


def require_format(path: Path) -> None:
    """Raises CacheError if the cache at `path` was written in a format that this release does not read."""
    try:
        attributes = json.loads((path / "zarr.json").read_text())["attributes"]["occfeat"]
        version, options = attributes["spec"]["format_version"], set(attributes["spec"])
    except (ValueError, KeyError, TypeError):
        return  # not a cache at all, or damaged: other checks say so
    others = sorted((options | set(LATER)) ^ {field.name for field in fields(TargetSpec)})
    if version == FORMAT_VERSION and not others:
        return
    reason = f"other options ({', '.join(others)})" if version == FORMAT_VERSION else f"format version {version}"
    raise CacheError(
        f"{path / 'zarr.json'} was not written by this release of occfeat, which reads format version {FORMAT_VERSION}: it has "
        f"{reason}. Use the release that built it, or delete the cache and build it again:\n"
        + f"{rebuild_command(path, attributes)} --overwrite"
    )


def rebuild_command(path: Path, attributes: Mapping[str, Any]) -> str:
    """The command that builds a cache with the options stored in its attributes, of this or an earlier format."""
    spec, origin = attributes["spec"], attributes.get("provenance", {})
    if spec.get("corruption") is not None:
        return _corruption_command(path, spec["corruption"], origin)
    cameras = [name for name in spec["frames"] if name != EGO_FRAME]
    frames = "ego" if not cameras else "both" if EGO_FRAME in spec["frames"] else "cameras"
    grid, teacher, default = spec["grid"], spec.get("teacher"), TargetSpec().to_dict()
    options: dict[str, Any] = {
        "source": spec.get("source"),
        "dataroot": origin.get("dataroot"),
        "cache": path.parent,
        "split": origin.get("split", path.stem),
        "version": origin.get("version"),
        "scenes": _scenes(path) if origin.get("left_out_scenes") else None,
        "frames": frames,
        "sweeps": spec["num_sweeps"],
        "dynamic": spec.get("dynamic", LATER["dynamic"]) if spec["num_sweeps"] > 1 else None,
        "image-size": "x".join(map(str, spec["image_size"])),
        "feature-dtype": spec["feature_dtype"],
        "dividers": spec["dividers"],
        "compat": spec["compat"],
        "shard-size": attributes["keyframes_per_shard"],
        "on-error": _on_error(path),
        "label-kinds": ",".join(spec["labels"]) or None,
        "teacher": "none" if teacher is None else teacher["name"],
    }
    if teacher is not None:
        size = "x".join(map(str, teacher["input_size"]))
        options |= {"teacher-layer": teacher["layer"], "teacher-dtype": teacher["dtype"], "feature-size": size}
    words = ["occfeat-targets", "build"]
    for name, value in options.items():
        words += [f"--{name}", str(value)] if value is not None else []
    if grid != default["grid"]:
        bounds = zip(grid["lower"], grid["upper"], strict=True)
        words += [
            "--grid",
            "x".join(map(str, grid["shape"])),
            "--range",
            *(f"{side:g}" for pair in bounds for side in pair),
        ]
    words += (
        ["--instances"] * bool(spec.get("instances"))
        + ["--points"] * bool(spec.get("max_points"))
        + ["--rays"] * bool(spec.get("rays"))
        + ["--no-labels"] * (not spec["labels"])
    )
    return shlex.join(words)


def _on_error(path: Path) -> str | None:
    """The --on-error with which a build can leave out what this one did; None if the records say of nothing left out."""
    found = None
    for file in sorted((path / "progress").glob("[0-9]*.json")):
        try:
            record = json.loads(file.read_text())
            if record.get("masked"):
                return "mask-camera"
            if record.get("skipped"):
                found = "skip"
        except (OSError, ValueError, AttributeError):
            continue
    return found


def _corruption_command(path: Path, corruption: Mapping[str, Any], origin: Mapping[str, Any]) -> str:
    """Of a corrupted cache; the clean one is three folders up."""
    words = ["occfeat-targets", "build", "--cache", str(path.parents[2]), "--split", origin.get("split", path.stem)]
    words += ["--corruption", corruption["name"], "--severity", str(corruption["severity"])]
    if corruption["protocol"] == "downloaded":
        words += ["--nuscenes-c", origin["nuscenes_c"]]
    else:
        words += ["--corruption-seed", str(corruption["seed"]), "--corrupt-at", corruption["protocol"]]
    return shlex.join(words + ["--mask-lost"] * corruption["masks_lost"])


def _scenes(path: Path) -> str | None:
    """Names of the cache's scenes, joined by commas."""
    try:
        names = np.asarray(zarr.open_array(path / "scene", mode="r")[:])
    except (OSError, ValueError):
        return None
    return ",".join(dict.fromkeys(map(str, names)))

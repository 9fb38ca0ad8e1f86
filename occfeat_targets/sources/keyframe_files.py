"""Keyframes and maps as files, from which a build, `verify` and `preview` read them without the data set's tables.

Every number is kept exactly. Paths are relative to the data set's folder, so that it may be moved.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.sources.keyframe import CameraView, Keyframe, Sweep, Track
from occfeat_targets.sources.map_geometry import MapGeometry


def keyframes_to_bytes(keyframes: Sequence[Keyframe], folder: Path) -> bytes:
    """JSON of keyframes whose files are in `folder`."""

    def encode(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value.relative_to(folder)) if value.is_relative_to(folder) else str(value)
        if isinstance(value, Keyframe) and not value.tracks:  # as in the plans of releases without tracks
            return {name: part for name, part in vars(value).items() if name != "tracks"}
        return value.tolist() if isinstance(value, np.ndarray) else vars(value)

    return json.dumps(keyframes, default=encode, separators=(",", ":")).encode()


def keyframes_from_bytes(content: bytes, folder: Path) -> tuple[Keyframe, ...]:
    """The keyframes, with their files in `folder`."""
    return tuple(_keyframe(values, folder) for values in json.loads(content))


def _keyframe(values: Mapping[str, Any], folder: Path) -> Keyframe:
    arrays: dict[str, Any] = {
        "global_from_ego": _floats(values["global_from_ego"]),
        "cameras": tuple(_view(view, folder) for view in values["cameras"]),
        "sweeps": tuple(_sweep(sweep, folder) for sweep in values["sweeps"]),
        "vehicle_corners": _floats(values["vehicle_corners"]).reshape(-1, 8, 3),
        "visibility": np.array(values["visibility"], np.uint8),
        "tracks": tuple(Track(**{name: _floats(each[name]) for name in each}) for each in values.get("tracks", ())),
    }
    return Keyframe(**{**values, **arrays})


def _view(values: Mapping[str, Any], folder: Path) -> CameraView:
    matrices: dict[str, Any] = {name: _floats(values[name]) for name in ("intrinsics", "ego_from_cam", "cam_from_ego")}
    place: dict[str, Any] = {"path": folder / values["path"], "source_size": tuple(values["source_size"])}
    return CameraView(**{**values, **matrices, **place})


def _sweep(values: Mapping[str, Any], folder: Path) -> Sweep:
    return Sweep(folder / values["path"], _floats(values["ego_from_sensor"]), values["seconds"])


def _floats(values: Any) -> NDArray[np.float64]:
    return np.array(values, np.float64)


def map_to_bytes(geometry: MapGeometry) -> bytes:
    """The .npz of a map."""
    file = io.BytesIO()
    arrays = {field.name: np.asarray(getattr(geometry, field.name)) for field in fields(geometry) if field.init}
    np.savez(file, **arrays)
    return file.getvalue()


def map_from_bytes(content: bytes) -> MapGeometry:
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        classes = tuple(str(name) for name in arrays["classes"])
        return MapGeometry(classes, **{name: arrays[name] for name in arrays.files if name != "classes"})

"""Keyframes and maps that are written to files and read again are exactly the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from occfeat_targets.cache.spec import CAMERAS
from occfeat_targets.sources import nuscenes
from occfeat_targets.sources.keyframe import Keyframe, broken_view
from occfeat_targets.sources.keyframe_files import (
    keyframes_from_bytes,
    keyframes_to_bytes,
    map_from_bytes,
    map_to_bytes,
)


def test_keyframes_and_maps_in_files_are_exactly_the_same(city):
    split = nuscenes.read_split(city, "mini_train", version=None, cameras=CAMERAS, num_sweeps=3, with_boxes=True)
    view = replace(broken_view("no record"), path=split.dataroot)
    broken = replace(split.keyframes[0], cameras=(view, *split.keyframes[0].cameras[1:]))
    keyframes = [broken, Keyframe("a", "scene", 7, "town", problem="no sweep"), *split.keyframes[2:]]
    content = keyframes_to_bytes(keyframes, split.dataroot)
    again = keyframes_from_bytes(content, split.dataroot)
    for before, after in zip(keyframes, again, strict=True):
        assert_equal(before, after)
    assert str(city) not in content.decode()
    geometry = nuscenes.read_map(split.dataroot, split.locations[0], "road")
    assert_equal(geometry, map_from_bytes(map_to_bytes(geometry)))


def assert_equal(a: object, b: object) -> None:
    assert type(a) is type(b)
    if isinstance(a, np.ndarray):
        assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    elif isinstance(a, tuple):
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    elif hasattr(a, "__dict__") and not isinstance(a, Path):
        for name, value in vars(a).items():
            assert_equal(value, vars(b)[name])
    else:
        assert a == b

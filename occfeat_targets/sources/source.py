"""What a build, `verify` and `preview` ask of a data set, and the table of data sets.

A new data set is a file with a class that has the attributes of `Source`, and a row in SOURCES.
"""

from __future__ import annotations

from pathlib import Path
from pkgutil import resolve_name
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.sources.keyframe import DatasetError, Split
from occfeat_targets.sources.map_geometry import MapGeometry

# {name: class}. Resolved when used, so that a command line starts fast.
SOURCES = {"nuscenes": "occfeat_targets.sources.nuscenes:NuScenes"}


class Source(Protocol):
    """A data set. It is constructed without arguments and holds no state: everything it reads is in values of `Split`.

    cameras: names of V cameras, in the order of the camera axis of every array.
    slow_reader: "package.module:function" with the signature of `verify.slow_nuscenes.read_slow_source`: an independent
    reader for `verify`, which shares no code with this class. None: `verify` uses this class's own keyframes.
    max_returns: the most returns of a sweep.
    ego_box: returns with abs(x) and abs(y) below this [m] in the sensor's frame are from the ego vehicle, and a build drops
    them; 0 drops none.
    """

    @property
    def cameras(self) -> tuple[str, ...]: ...

    @property
    def slow_reader(self) -> str | None: ...

    @property
    def max_returns(self) -> int: ...

    @property
    def ego_box(self) -> float: ...

    def read_split(
        self,
        root: Path,
        split: str,
        *,
        version: str | None,
        num_sweeps: int,
        with_boxes: bool,
        with_tracks: bool = False,
    ) -> Split:
        """All keyframes of a split, each with V views, sweeps (its own first, then backwards in time), and vehicle boxes.

        version: a release of the data set; None for the usual one. with_tracks: also the annotated objects of each keyframe with their
        poses before (`Keyframe.tracks`); a source without them need not have this argument. A problem of a single keyframe or view is recorded in it.
        Raises DatasetError if there is no such split or version, or its tables do not load.
        """
        ...

    def read_sweep(self, path: Path) -> NDArray[np.float32]:
        """(n, 4 or more) returns of a sweep: x, y, z [m] in the sensor's frame, intensity.

        Raises ValueError that names the file and the remedy if it is missing or damaged.
        """
        ...

    def why_no_maps(self, split: Split) -> str | None:
        """Why map labels cannot be drawn, and the remedy if there is one; None if they can."""
        ...

    def map_file(self, split: Split, location: str) -> Path:
        """The file of a location's map, whose SHA-256 is kept in the cache. Only asked if `why_no_maps` is None."""
        ...

    def read_map(self, split: Split, location: str, dividers: str) -> MapGeometry:
        """A location's map. dividers: "road" or "road+lane". Raises DatasetError if it does not load."""
        ...


def open_source(name: str) -> Source:
    """The data set of this name. Raises DatasetError if SOURCES has none."""
    if name not in SOURCES:
        raise DatasetError(f"--source {name}: one of {', '.join(SOURCES)} expected")
    source: Source = resolve_name(SOURCES[name])()
    return source

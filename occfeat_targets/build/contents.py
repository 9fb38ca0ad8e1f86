"""What a build needs of a data set's tables: keyframes, maps, and which labels there can be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

from occfeat_targets.build.options import BuildOptions
from occfeat_targets.cache.labels import LABEL_KINDS
from occfeat_targets.cache.records import digest
from occfeat_targets.cache.spec import TeacherSpec
from occfeat_targets.cache.store import Identity
from occfeat_targets.common.provenance import describe_origin
from occfeat_targets.sources.keyframe import DatasetError, Split
from occfeat_targets.sources.map_geometry import MapGeometry
from occfeat_targets.sources.scenes import choose_scenes
from occfeat_targets.sources.source import Source

RANDOM_TEACHER = "the teacher's weights are random"
SYNTHETIC_DATA = "the data set is a synthetic city"


@dataclass(frozen=True)
class Contents:
    """What a build needs of the tables, and what of it goes into the cache.

    labels: kinds to build. missing_labels: {other kind: why it is missing}, if none was asked for by name.
    maps, map_files: {location: its map, the file that it was read from}, if a kind needs them.
    """

    split: Split
    labels: tuple[str, ...]
    missing_labels: dict[str, str]
    maps: Mapping[str, MapGeometry]
    map_files: Mapping[str, Path]

    @property
    def identity(self) -> Identity:
        keyframes = self.split.keyframes
        return Identity(
            tuple(k.token for k in keyframes),
            tuple(k.scene for k in keyframes),
            tuple(k.timestamp_us for k in keyframes),
        )

    def provenance(self, options: BuildOptions, teacher: TeacherSpec | None) -> dict[str, Any]:
        simulated = [SYNTHETIC_DATA] if self.split.is_synthetic else []
        if teacher is not None and teacher.is_random:
            simulated.append(RANDOM_TEACHER)
        there = {keyframe.scene for keyframe in self.split.keyframes}
        names = ("numpy", "zarr", "simplejpeg", "torch", "transformers")
        return {
            "simulated": simulated,
            "split": self.split.name,
            "version": self.split.version,
            "dataroot": str(options.dataroot.absolute()),
            "missing_scenes": list(self.split.missing_scenes),
            "left_out_scenes": list(self.split.left_out_scenes),
            "table_order": [name for name in self.split.table_order if name in there],
            "missing_labels": self.missing_labels,
            "maps_sha256": {location: digest(file) for location, file in self.map_files.items()},
            **describe_origin(names, _gpus(teacher)),
        }


def read_contents(
    options: BuildOptions, source: Source, labels: tuple[str, ...] | None, print_line: Callable[[str], None]
) -> Contents:
    """Read the tables. labels: kinds that are asked for, None for all that the data set has.

    Raises DatasetError if the tables do not load, or the data set lacks a scene or a kind of labels that is asked for.
    """
    print_line(f"reading the tables of {options.dataroot}, once for all processes of this build ...")
    tracks: dict[str, bool] = {"with_tracks": True} if options.moving_objects == "boxes" else {}
    if tracks and "with_tracks" not in signature(source.read_split).parameters:
        raise DatasetError(
            f"--source {options.source} has no tracks of objects, which --dynamic boxes needs: pass --dynamic carve"
        )
    split = source.read_split(
        options.dataroot,
        options.split,
        version=options.version,
        num_sweeps=options.num_sweeps,
        with_boxes=_need("annotations", LABEL_KINDS if labels is None else labels),
        **tracks,
    )
    if options.scenes is not None:
        split = choose_scenes(split, options.scenes)
    kinds, missing = _labels(labels, source, split)
    locations = split.locations if _need("maps", kinds) else ()
    maps = {location: source.read_map(split, location, options.dividers) for location in locations}
    files = {location: source.map_file(split, location) for location in locations}
    return Contents(split, kinds, missing, maps, files)


def _need(what: str, labels: Iterable[str]) -> bool:
    return any(what in LABEL_KINDS[name].needs for name in labels)


def _labels(asked: tuple[str, ...] | None, source: Source, split: Split) -> tuple[tuple[str, ...], dict[str, str]]:
    """The kinds of labels to build, and {other kind: why it is missing} if none was asked for by name."""
    lacks = {}
    if not split.has_annotations:
        lacks["annotations"] = f"{split.version} has no annotations"
    if (why_no_maps := source.why_no_maps(split)) is not None:
        lacks["maps"] = why_no_maps
    missing = {name: lacks[need] for name, kind in LABEL_KINDS.items() for need in kind.needs if need in lacks}
    there = [name for name in LABEL_KINDS if name not in missing]
    if asked is None:
        return tuple(there), missing
    for name in asked:
        if name in missing:
            options = f"--label-kinds {','.join(there)} or --no-labels" if there else "--no-labels"
            raise DatasetError(f"no {name} labels: {missing[name]}; or build with {options}")
    return tuple(name for name in LABEL_KINDS if name in asked), {}


def _gpus(teacher: TeacherSpec | None) -> list[str]:
    """Names of the GPUs that this process sees; none are looked for without a teacher."""
    if teacher is None:
        return []
    from occfeat_targets.targets.teacher_devices import gpu_names

    return gpu_names()

"""The plan in a cache: the keyframes of every shard and the maps, as planning found them in the data set's tables.

Planning reads all tables, which takes a minute and gigabytes for nuScenes. It happens once: ``progress/plan`` in the cache holds
one file for each shard and map, and ``progress/plan.json`` their SHA-256 and the sizes and times of the tables. Every
later process of the build, and `verify` and `preview`, read only the files that they need. If a table has changed, or a file of the
plan is lost, the next build plans again. Users share caches, so the files are JSON and .npz without pickles.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from urllib.parse import quote

from occfeat_targets.build.contents import Contents
from occfeat_targets.build.options import BuildOptions
from occfeat_targets.cache.drafts import PROGRESS
from occfeat_targets.cache.records import CacheError, digest, read_record, write_file, write_record, writing
from occfeat_targets.cache.store import CREATED, Cache
from occfeat_targets.sources.keyframe import Keyframe
from occfeat_targets.sources.keyframe_files import (
    keyframes_from_bytes,
    keyframes_to_bytes,
    map_from_bytes,
    map_to_bytes,
)
from occfeat_targets.sources.map_geometry import MapGeometry

PLAN = "plan"
# Raise it with every change of Keyframe or MapGeometry, except for fields that are left out when empty: a build then plans again.
_FORMAT = 1


@dataclass(frozen=True)
class StoredPlan:
    """A plan in a cache, and where its data set is now.

    folder: of its files. data: the data set's folder. files: {name in the folder: SHA-256}.
    tables: {file relative to `data`: [size, time of the last change in ns]}. versions: names of the release for --version.
    """

    folder: Path
    data: Path
    files: Mapping[str, str]
    tables: Mapping[str, list[int]]
    versions: tuple[str | None, ...]
    _maps: dict[str, MapGeometry] = field(default_factory=dict, repr=False, compare=False)

    def keyframes(self, cache: Cache, shard: int) -> tuple[Keyframe, ...]:
        """The keyframes of a shard. Raises CacheError if its file is lost or was changed."""
        keyframes = keyframes_from_bytes(self._read(_shard_name(shard)), self.data)
        if [k.token for k in keyframes] != [cache.identity.tokens[i] for i in cache.shard_range(shard)]:
            raise self._broken(_shard_name(shard), "is that of another shard or cache")
        return keyframes

    def find(self, cache: Cache, indices: Iterable[int]) -> dict[int, Keyframe]:
        """{index: keyframe} of some keyframes of the cache."""
        found, step = {}, cache.keyframes_per_shard
        for shard, chosen in groupby(sorted(indices), lambda index: index // step):
            keyframes = self.keyframes(cache, shard)
            found.update({index: keyframes[index % step] for index in chosen})
        return found

    def has_map(self, location: str) -> bool:
        return _map_name(location) in self.files

    def map(self, location: str) -> MapGeometry:
        """The map of a location. Raises CacheError if its file is lost or was changed."""
        if location not in self._maps:
            self._maps[location] = map_from_bytes(self._read(_map_name(location)))
        return self._maps[location]

    def is_same_map(self, location: str, geometry: MapGeometry) -> bool:
        """Whether the plan has exactly this map of a location."""
        return self.files.get(_map_name(location)) == hashlib.sha256(map_to_bytes(geometry)).hexdigest()

    def is_intact(self, shards: Iterable[int]) -> bool:
        """Whether the files of these shards and of all maps are there and unchanged."""
        names = {*map(_shard_name, shards), *(name for name in self.files if name.endswith(".npz"))}
        try:
            return all(self._read(name) for name in names)
        except CacheError:
            return False

    def is_current(self, version: str | None) -> bool:
        """Whether the data set's tables are those that were read, and no other version is asked for."""
        there = {name: _stamp(self.data / name) for name in self.tables}
        return version in self.versions and there == self.tables

    def copy_to(self, path: Path) -> None:
        """Write the same plan into the folder of a new cache of the same keyframes. Raises CacheError if a file is lost or was changed."""
        folder, record = path / PROGRESS / PLAN, read_record(self.folder.with_name(f"{PLAN}.json"))
        folder.mkdir(parents=True)
        for name in self.files:
            write_file(folder / name, self._read(name))
        write_record(_record_file(path), {**record, "metadata": digest(path / PROGRESS / f"{CREATED}.json")})

    def _read(self, name: str) -> bytes:
        try:
            content = (self.folder / name).read_bytes()
        except OSError as err:
            raise self._broken(name, f"cannot be read ({err.strerror})") from err
        if hashlib.sha256(content).hexdigest() != self.files.get(name):
            raise self._broken(name, "was changed after it was written")
        return content

    def _broken(self, name: str, fault: str) -> CacheError:
        return CacheError(
            f"{self.folder / name} {fault}: run the same build again, and it reads the data set's tables again"
        )


def open_plan(cache: Cache, dataroot: Path) -> StoredPlan | None:
    """The plan of a cache for a data set at `dataroot`; None if there is none, or it is another cache's or release's."""
    try:
        record = read_record(_record_file(cache.path))
    except CacheError:
        return None
    if record.get("format") != _FORMAT or record["metadata"] != cache.metadata:
        return None
    data = dataroot / record["base"]
    return StoredPlan(
        cache.path / PROGRESS / PLAN,
        data if data.is_dir() else dataroot,
        record["files"],
        record["tables"],
        (None, *record["versions"]),
    )


def write_plan(path: Path, contents: Contents, options: BuildOptions) -> None:
    """Write the plan of the cache at `path`. Files that are there already are kept; several processes may write them at once.

    Raises CacheError if the disk is full or not writable.
    """
    split, folder = contents.split, path / PROGRESS / PLAN
    data, dataroot, step = split.dataroot, options.dataroot, options.keyframes_per_shard
    tables = (*split.tables, *contents.map_files.values())
    with writing(f"the plan of {path}"):
        folder.mkdir(parents=True, exist_ok=True)
        files = {
            _map_name(name): _write(folder / _map_name(name), map_to_bytes(m)) for name, m in contents.maps.items()
        }
        for shard, start in enumerate(range(0, len(split.keyframes), step)):
            keyframes = keyframes_to_bytes(split.keyframes[start : start + step], data)
            files[_shard_name(shard)] = _write(folder / _shard_name(shard), keyframes)
        record = {
            "format": _FORMAT,
            "metadata": digest(path / PROGRESS / f"{CREATED}.json"),
            "base": str(data.relative_to(dataroot)) if data.is_relative_to(dataroot) else ".",
            "versions": sorted({split.version, options.version or split.version}),
            "tables": {str(file.relative_to(data)): _stamp(file) for file in tables},
            "files": files,
        }
        write_record(_record_file(path), record)


def plan_files(cache: Cache) -> dict[str, str] | None:
    """{name relative to the cache: SHA-256} of the plan's files; None if there is no plan."""
    plan = open_plan(cache, cache.path)
    return None if plan is None else {f"{PROGRESS}/{PLAN}/{name}": sha256 for name, sha256 in plan.files.items()}


def _write(file: Path, content: bytes) -> str:
    sha256 = hashlib.sha256(content).hexdigest()
    if not (file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == sha256):
        write_file(file, content)
    return sha256


def _stamp(file: Path) -> list[int]:
    """Size and time of the last change; empty if the file is missing."""
    try:
        status = file.stat()
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns]


def _record_file(path: Path) -> Path:
    return path / PROGRESS / f"{PLAN}.json"


def _shard_name(shard: int) -> str:
    return f"{shard:05d}.json"


def _map_name(location: str) -> str:
    return f"map-{quote(location, safe='')}.npz"

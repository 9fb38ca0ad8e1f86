"""Verification of a cache: checksums of all files, and random keyframes against their data set.

Checksums find changes after writing (a flipped bit, a lost file). Recomputing keyframes with the slow code of
the modules `slow_*` finds errors made before writing (a wrong transform, a wrong resize).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np

from occfeat_targets.build.planned import PLAN, open_plan, plan_files
from occfeat_targets.cache.drafts import PROGRESS, is_draft
from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.cache.records import CacheError, digest, read_record, sizes_of_files
from occfeat_targets.cache.store import CREATED, Cache
from occfeat_targets.common.plural import count
from occfeat_targets.common.progress import progress_bar
from occfeat_targets.sources.source import open_source
from occfeat_targets.verify.recompute import CHECKS, without_masked
from occfeat_targets.verify.slow_targets import SlowSource, as_slow_source


@dataclass
class Findings:
    """Results of verify. problems: one line each, empty if the cache is sound. notes: measurements."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify_checksums(cache: Cache, progress: bool = True) -> Findings:
    """Read all files of the cache and compare their checksums with those recorded when they were written.

    If a record is invalid, files are not reported as foreign, because the list of the cache's files is incomplete.
    """
    findings = Findings()
    expected: dict[str, str] = dict(read_record(cache.path / PROGRESS / f"{CREATED}.json")["files"])
    records = {f"{PROGRESS}/{CREATED}.json"}
    sound: dict[int, dict[str, Any]] = {}
    recorded = cache.recorded_shards()
    for shard in recorded:
        records.add(f"{PROGRESS}/{shard:05d}.json")
        try:
            sound[shard] = cache.shard_record(shard)
        except CacheError as err:
            findings.problems.append(str(err))
    for record in sound.values():
        expected.update(record["files"])
    plan = plan_files(cache)
    if plan is not None:
        expected.update(plan)
        records.add(f"{PROGRESS}/{PLAN}.json")
    records |= {f"{PROGRESS}/{shard:05d}.failed.json" for shard in cache.failed_shards()}
    there = {
        name: size for name, size in sizes_of_files(cache.path).items() if not is_draft(name)
    }  # removed by the next build
    if plan is None:  # not yet complete, or its record is damaged: the next build writes both
        there = {name: size for name, size in there.items() if not name.startswith(f"{PROGRESS}/{PLAN}/")}
    unfinished = {str(shard) for shard in range(cache.num_shards) if shard not in sound}
    for name in sorted(set(expected) - set(there)):
        findings.problems.append(f"{cache.path / name} is missing: restore it, or {_remedy(cache, name)}")
    strangers = set(there) - set(expected) - records if len(sound) == len(recorded) else set()
    for name in sorted(strangers):
        if _shard_of(name) not in unfinished:
            findings.problems.append(f"{cache.path / name} does not belong to the cache: remove it")
    names = sorted(set(expected) & set(there))
    bar = progress_bar(sum(there[n] for n in names), unit="B", unit_scale=True, disable=not progress)
    with ThreadPoolExecutor() as pool, bar:
        for name, sha256 in zip(names, pool.map(lambda n: digest(cache.path / n), names), strict=True):
            if sha256 != expected[name]:
                findings.problems.append(
                    f"{cache.path / name} was changed after it was written: {_remedy(cache, name)}"
                )
            bar.update(there[name])
    findings.notes.append(
        f"{count(len(names), 'file')} of {count(len(sound), 'shard')} read and compared with their SHA-256"
    )
    if not findings.problems:
        reader = CacheReader(cache, allow_incomplete=True)
        is_valid = reader.is_valid
        for shard, record in sound.items():
            masked = {cache.identity.tokens[i] for i in cache.shard_range(shard) if not is_valid[i]}
            if masked != record["skipped"].keys():
                findings.problems.append(
                    f"the record of shard {shard} says that {sorted(record['skipped'])} were skipped, but the masked samples "
                    f"are {sorted(masked)}: delete this record and run the build again"
                )
            cameras = _masked_cameras(reader, shard)
            if cameras != {token: sorted(why) for token, why in record["masked"].items()}:
                findings.problems.append(
                    f"the record of shard {shard} says that the cameras {record['masked']} were masked, but {cameras} are: "
                    "delete this record and run the build again"
                )
    masked_cameras = [camera for record in sound.values() for why in record["masked"].values() for camera in why]
    if masked_cameras:
        findings.notes.append(
            f"{count(len(masked_cameras), 'masked camera')}: 'occfeat-targets status' lists the reasons"
        )
    return findings


def _remedy(cache: Cache, name: str) -> str:
    if name.startswith(f"{PROGRESS}/{PLAN}/"):
        return f"delete {cache.path / PROGRESS / PLAN}.json and run the build again, which reads the data set's tables again"
    return f"delete the record of its shard in {cache.path / PROGRESS} and run the build again"


def _masked_cameras(reader: CacheReader, shard: int) -> dict[str, list[str]]:
    """{sample token: names of its masked cameras} of a shard's valid keyframes."""
    cache, found = reader.cache, {}
    for keyframe in cache.shard_range(shard):
        is_seen = reader.read("camera_valid", keyframe)
        if reader.is_valid[keyframe] and not is_seen.all():
            names = [name for name, seen in zip(cache.spec.cameras, is_seen, strict=True) if not seen]
            found[cache.identity.tokens[keyframe]] = sorted(names)
    return found


def _shard_of(name: str) -> str:
    """The shard number in a chunk's file name, or ''."""
    _, _, chunk = name.partition("/c/")
    return chunk.replace(".", "/").split("/")[0]


def verify_source(
    cache: Cache,
    dataroot: Path,
    num_keyframes: int,
    seed: int,
    progress: Callable[[str], None] = print,
    *,
    tables: bool = False,
) -> Findings:
    """Recompute random keyframes from the data set with slow, independent code.

    tables: read paths, transforms and boxes from the data set's tables, with independent code if the source has some. Otherwise
    they are those of the plan in the cache, which saves reading the tables. `progress` is told how many, and which of the two.
    Raises ValueError if there is no data set at `dataroot`, or it lacks a keyframe.
    """
    findings = Findings()
    reader = CacheReader(cache, allow_incomplete=True)
    finished = [i for shard in cache.finished_shards() for i in cache.shard_range(shard) if reader.is_valid[i]]
    if not finished:
        progress("no keyframe is valid: none is recomputed from the data set")
        return findings
    chosen = sorted(np.random.default_rng(seed).permutation(finished)[:num_keyframes].tolist())
    progress(f"recomputing {len(chosen)} of {len(finished)} valid keyframes from {dataroot} (--seed {seed}) ...")
    tokens = [cache.identity.tokens[i] for i in chosen]
    reference = _read_slow_source(cache, dataroot, chosen, progress, tables=tables)
    for keyframe, token in zip(chosen, tokens, strict=True):
        source = without_masked(reference.keyframes[token], reader.read("camera_valid", keyframe))
        # checks that read the same damaged sweep have the same finding
        found = list(
            dict.fromkeys(finding for check in CHECKS for finding in check(reader, keyframe, reference, source))
        )
        findings.problems += [f"sample {token}: {text}" for is_good, text in found if not is_good]
        line = f"sample {token}: " + "; ".join(text for _, text in found)
        findings.notes.append(line)
        progress(line)
    return findings


def _read_slow_source(
    cache: Cache, dataroot: Path, chosen: Sequence[int], progress: Callable[[str], None], *, tables: bool
) -> SlowSource:
    source, spec, origin = open_source(cache.spec.source), cache.spec, cache.provenance
    tokens = [cache.identity.tokens[i] for i in chosen]
    plan = None if tables else open_plan(cache, dataroot)
    if plan is not None:
        progress(
            "paths, transforms and boxes are those of the build's plan; --tables reads them from the data set's tables"
        )
    elif source.slow_reader is None:
        progress(f"{spec.source} has no independent reader: paths, transforms and boxes are checked against themselves")
    if source.slow_reader is not None:
        read: Callable[..., SlowSource] = resolve_name(source.slow_reader)
        reference = read(dataroot, origin["version"], tokens if plan is None else (), spec)
    elif plan is None:
        reference = as_slow_source(source, dataroot, origin["split"], origin["version"], spec)
    else:
        reference = SlowSource({}, source.read_sweep, plan.map)
    if plan is not None:
        reference = replace(reference, keyframes={k.token: k for k in plan.find(cache, chosen).values()})
    missing = [token for token in tokens if token not in reference.keyframes]
    if missing:
        raise ValueError(f"{dataroot} has no sample {missing[0]}: pass the --dataroot that {cache.path} was built from")
    return reference

"""Verification of a cache: checksums of all files, and random keyframes against their data set.

Checksums find changes after writing (a flipped bit, a lost file). Recomputing keyframes with the slow code of
`slow_targets` and `slow_labels` finds errors made before writing (a wrong transform, a wrong resize).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from occfeat_targets.cache.labels import LABEL_KINDS
from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.cache.records import CacheError, digest, read_record
from occfeat_targets.cache.spec import TargetSpec
from occfeat_targets.cache.store import CREATED, PROGRESS, Cache, is_draft
from occfeat_targets.sources.keyframe import Keyframe
from occfeat_targets.sources.source import open_source
from occfeat_targets.targets.images import load_image_reference
from occfeat_targets.verify.slow_labels import Reference
from occfeat_targets.verify.slow_targets import SlowSource, as_slow_source, grid_from_ego, occupancy_bounds

MIN_PSNR = 40.0  # [dB], of a cached image to a full decode and resize; scaled decoding reaches 50 and more
MIN_COSINE = 0.99  # mean over tokens; bfloat16 and the scaled decode together give 0.999
MAX_CALIBRATION_ERROR = 1e-3  # [m, px]; float32 storage gives 1e-4


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
    records |= {f"{PROGRESS}/{shard:05d}.failed.json" for shard in cache.failed_shards()}
    there = {str(p.relative_to(cache.path)): p.stat().st_size for p in cache.path.rglob("*") if p.is_file()}
    there = {name: size for name, size in there.items() if not is_draft(name)}  # removed by the next build
    remedy = f"delete the record of its shard in {cache.path / PROGRESS} and run the build again"
    unfinished = {str(shard) for shard in range(cache.num_shards) if shard not in sound}
    for name in sorted(set(expected) - set(there)):
        findings.problems.append(f"{cache.path / name} is missing: restore it, or {remedy}")
    strangers = set(there) - set(expected) - records if len(sound) == len(recorded) else set()
    for name in sorted(strangers):
        if _shard_of(name) not in unfinished:
            findings.problems.append(f"{cache.path / name} does not belong to the cache: remove it")
    names = sorted(set(expected) & set(there))
    bar = tqdm(total=sum(there[n] for n in names), unit="B", unit_scale=True, disable=not progress, dynamic_ncols=True)
    with ThreadPoolExecutor() as pool, bar:
        for name, sha256 in zip(names, pool.map(lambda n: digest(cache.path / n), names), strict=True):
            if sha256 != expected[name]:
                findings.problems.append(f"{cache.path / name} was changed after it was written: {remedy}")
            bar.update(there[name])
    findings.notes.append(f"{len(names)} files of {len(sound)} shards read and compared with their SHA-256")
    if not findings.problems:
        is_valid = CacheReader(cache, allow_incomplete=True).is_valid
        for shard, record in sound.items():
            masked = {cache.identity.tokens[i] for i in cache.shard_range(shard) if not is_valid[i]}
            if masked != record["skipped"].keys():
                findings.problems.append(
                    f"the record of shard {shard} says that {sorted(record['skipped'])} were skipped, but the masked samples "
                    f"are {sorted(masked)}: delete this record and run the build again"
                )
    return findings


def _shard_of(name: str) -> str:
    """The shard number in a chunk's file name, or ''."""
    _, _, chunk = name.partition("/c/")
    return chunk.replace(".", "/").split("/")[0]


def verify_source(
    cache: Cache, dataroot: Path, num_keyframes: int, seed: int, progress: Callable[[str], None] = print
) -> Findings:
    """Recompute random keyframes from the data set with slow, independent code.

    If the source has no such code, its own keyframes are used, and `progress` is told so.
    Raises ValueError if there is no data set at `dataroot`, or it lacks a keyframe.
    """
    findings = Findings()
    reader = CacheReader(cache, allow_incomplete=True)
    finished = [i for shard in cache.finished_shards() for i in cache.shard_range(shard) if reader.is_valid[i]]
    chosen = sorted(np.random.default_rng(seed).permutation(finished)[:num_keyframes].tolist())
    tokens = [cache.identity.tokens[i] for i in chosen]
    reference = _read_slow_source(cache, dataroot, tokens, progress)
    for keyframe, token in zip(chosen, tokens, strict=True):
        found = [
            finding
            for check in (_calibration, _occupancy, _images, _features, _labels)
            for finding in check(reader, keyframe, reference, reference.keyframes[token])
        ]
        findings.problems += [f"sample {token}: {text}" for is_good, text in found if not is_good]
        line = f"sample {token}: " + "; ".join(text for _, text in found)
        findings.notes.append(line)
        progress(line)
    return findings


def _read_slow_source(
    cache: Cache, dataroot: Path, tokens: Sequence[str], progress: Callable[[str], None]
) -> SlowSource:
    source, spec, origin = open_source(cache.spec.source), cache.spec, cache.provenance
    if source.slow_reader is not None:
        reference: SlowSource = resolve_name(source.slow_reader)(dataroot, origin["version"], tokens, spec)
    else:
        progress(f"{spec.source} has no independent reader: paths, transforms and boxes are checked against themselves")
        reference = as_slow_source(source, dataroot, origin["split"], origin["version"], spec)
    missing = [token for token in tokens if token not in reference.keyframes]
    if missing:
        raise ValueError(f"{dataroot} has no sample {missing[0]}: pass the --dataroot that {cache.path} was built from")
    return reference


Checked = Iterator[tuple[bool, str]]  # (is it correct, measurement)


def _frames(spec: TargetSpec, source: Keyframe) -> list[NDArray[np.float64]]:
    return [grid_from_ego(source, frame, spec.cameras) for frame in spec.frames]


def _calibration(reader: CacheReader, keyframe: int, reference: SlowSource, source: Keyframe) -> Checked:
    spec = reader.cache.spec
    scaled = [
        np.diag([spec.image_size[1] / view.source_size[1], spec.image_size[0] / view.source_size[0], 1])
        @ view.intrinsics
        for view in source.cameras
    ]
    cam_from_ego = [view.cam_from_ego for view in source.cameras]
    expected = {"intrinsics": scaled, "cam_from_ego": cam_from_ego, "grid_from_ego": _frames(spec, source)}
    worst = max(float(np.abs(reader.read(name, keyframe) - np.array(e)).max()) for name, e in expected.items())
    yield worst <= MAX_CALIBRATION_ERROR, f"calibration within {worst:.1e}"


def _occupancy(reader: CacheReader, keyframe: int, reference: SlowSource, source: Keyframe) -> Checked:
    spec = reader.cache.spec
    volumes = spec.grid.unpack_volume(reader.read("occupancy", keyframe))
    wrong = 0
    for volume, frame in zip(volumes, _frames(spec, source), strict=True):
        try:
            must, may = occupancy_bounds(reference, source, frame, spec.grid, spec.ego_box)
        except ValueError as err:
            yield False, str(err)
            return
        wrong += int((must & ~volume).sum() + (volume & ~may).sum())
    yield wrong == 0, f"{int(volumes.sum())} occupied voxels, {wrong} voxels wrong"


def _images(reader: CacheReader, keyframe: int, reference: SlowSource, source: Keyframe) -> Checked:
    cached = reader.read("images", keyframe)
    worst = np.inf
    for image, view in zip(cached, source.cameras, strict=True):
        (full,) = load_image_reference(view.path, [reader.cache.spec.image_size])
        error = float(np.mean((image.astype(np.float64) - full) ** 2))
        worst = min(worst, 10 * np.log10(255**2 / error) if error else np.inf)
    yield worst >= MIN_PSNR, f"images at {worst:.1f} dB of full decoding"


def _features(reader: CacheReader, keyframe: int, reference: SlowSource, source: Keyframe) -> Checked:
    spec = reader.cache.spec
    if spec.teacher is None:
        return
    from dataclasses import replace

    from occfeat_targets.targets.teacher import load_teacher

    teacher = load_teacher(replace(spec.teacher, dtype="float32"))
    images = np.stack([load_image_reference(view.path, [spec.teacher.input_size])[0] for view in source.cameras])
    expected = np.concatenate([teacher(image[None]) for image in images])
    cached = reader.read("features", keyframe).astype(np.float32)
    cosine = (expected * cached).sum(-1) / (np.linalg.norm(expected, axis=-1) * np.linalg.norm(cached, axis=-1) + 1e-12)
    mean = float(cosine.mean())
    yield mean >= MIN_COSINE, f"features at cosine {mean:.5f} of float32 (worst token {float(cosine.min()):.5f})"
    if spec.feature_dtype == "int8":
        cached *= reader.read("feature_scale", keyframe)[..., None].astype(np.float32)
    ratio = float(np.linalg.norm(cached) / np.linalg.norm(expected))
    yield abs(ratio - 1) < 0.01, f"norm ratio {ratio:.4f}"


def _labels(reader: CacheReader, keyframe: int, reference: SlowSource, source: Keyframe) -> Checked:
    spec = reader.cache.spec
    kinds = [LABEL_KINDS[name] for name in spec.labels]
    needs_maps = any("maps" in kind.needs for kind in kinds)
    geometry = reference.read_map(source.location) if needs_maps else None
    wrong = 0
    for kind in kinds:
        draw: Reference = resolve_name(kind.reference)
        cached_masks, cached_valid = reader.read_labels(kind, keyframe)
        for i, frame in enumerate(_frames(spec, source)):
            masks, is_valid, is_decided = draw(source, spec, frame, geometry)
            wrong += int(((cached_masks[i] != masks) & is_decided).sum())
            if cached_valid is not None:
                wrong += int(((cached_valid[i] != is_valid) & is_decided).sum())
    if spec.labels:
        yield wrong == 0, f"{wrong} label cells wrong"

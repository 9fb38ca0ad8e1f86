"""Exchanged or edited records and metadata are found even if their own checksums were updated."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import zarr

from occfeat_targets.cache.create import create_cache
from occfeat_targets.cache.grid import VoxelGrid
from occfeat_targets.cache.opening import open_cache
from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.cache.records import CacheError, digest, read_record, write_record
from occfeat_targets.cache.shards import shard_file
from occfeat_targets.cache.store import Cache
from occfeat_targets.verify.verify import verify_checksums
from tests.conftest import random_arrays, small_identity, small_spec
from tests.targets.command_line import Result, run


def record_file(cache: Cache, shard: int) -> Path:
    return cache.path / "progress" / f"{shard:05d}.json"


def problems(cache: Cache) -> list[str]:
    return verify_checksums(cache, progress=False).problems


def command(name: str, cache: Cache, *more: str) -> Result:
    more = {"info": ("--json",)}.get(name, more)
    return run(name, "--cache", cache.path.parent, "--split", "train", *more, check=False)


def test_a_record_copied_over_another_is_refused_without_advice_to_remove_good_files(finished_cache):
    shutil.copy(record_file(finished_cache, 0), record_file(finished_cache, 1))
    expected = r"00001.json is not the record of this shard: its shard is 0, 1 expected.*delete this record"
    with pytest.raises(CacheError, match=expected):
        CacheReader(finished_cache.path)
    for name in ("status", "info"):
        assert "00001.json is not the record of this shard" in command(name, finished_cache).stderr
    found = command("verify", finished_cache, "--samples", "0")
    assert found.returncode == 1
    assert "1 problem found" in found.stderr
    assert "remove it" not in found.stdout
    record_file(finished_cache, 1).unlink()  # as the message advises
    assert finished_cache.pending_shards() == [1]
    with pytest.raises(CacheError, match="1 of 3 shards are missing"):
        CacheReader(finished_cache.path)
    finished_cache.write_shard(1, random_arrays(finished_cache, 1), {"skipped": {}, "cosine": None})
    assert problems(finished_cache) == []


def test_a_record_of_another_cache_is_refused(finished_cache, tmp_path):
    """The caches have the same spec and shards. Only their provenance differs."""
    other = create_cache(
        tmp_path / "other.zarr", small_spec(), small_identity(), keyframes_per_shard=3, provenance={"simulated": ["x"]}
    )
    other.write_shard(1, random_arrays(other, 1), {"skipped": {}, "cosine": None})
    shutil.copy(record_file(other, 1), record_file(finished_cache, 1))
    with pytest.raises(CacheError, match=r"00001.json is not the record of this shard: its metadata is"):
        CacheReader(finished_cache.path)
    (problem,) = problems(finished_cache)
    assert f"its metadata is {other.metadata}, {finished_cache.metadata} expected" in problem


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"shard": 2}, "its shard is 2, 1 expected"),
        ({"keyframes": [3, 5]}, r"its keyframes is \[3, 5\], \[3, 6\] expected"),
        ({"metadata": None}, "its metadata is None"),
        ({"files": {}}, r"its files is \[\], \['cam_from_ego/c/1/0/0/0', "),
    ],
)
def test_an_edited_record_is_refused_even_if_its_checksum_was_updated(finished_cache, change, complaint):
    file = record_file(finished_cache, 1)
    write_record(file, {**read_record(file), **change})
    with pytest.raises(CacheError, match=complaint):
        CacheReader(finished_cache.path)
    (problem,) = problems(finished_cache)
    assert "00001.json is not the record of this shard" in problem


def test_a_record_that_hides_a_skipped_keyframe_is_found(small_cache):
    for shard in range(small_cache.num_shards):
        arrays = random_arrays(small_cache, shard)
        arrays["is_valid"][0] = shard != 1
        skipped = {} if shard != 1 else {"token3": "no sweep"}
        small_cache.write_shard(shard, arrays, {"skipped": skipped, "cosine": None})
    assert problems(small_cache) == []
    file = record_file(small_cache, 1)
    write_record(file, {**read_record(file), "skipped": {}})
    (problem,) = problems(small_cache)
    assert r"the record of shard 1 says that [] were skipped, but the masked samples are ['token3']" in problem


def test_a_digest_edited_in_a_record_is_found(finished_cache):
    file = record_file(finished_cache, 1)
    record = read_record(file)
    for name in record["files"]:
        write_record(file, {**record, "files": {**record["files"], name: "0" * 64}})
        (problem,) = problems(finished_cache)
        assert name in problem and "was changed after it was written" in problem


def test_chunks_exchanged_between_two_shards_are_found(finished_cache):
    for array in finished_cache.spec.arrays():
        files = [shard_file(finished_cache.path, array, shard) for shard in (0, 1)]
        if array.name in ("is_valid", "camera_valid", "image_area"):  # the same in both
            continue
        exchange(*files)
        assert [str(file) in problem for file, problem in zip(files, problems(finished_cache), strict=True)] == [
            True
        ] * 2
        exchange(*files)
    assert problems(finished_cache) == []


def exchange(a: Path, b: Path) -> None:
    aside = a.with_name("aside")
    a.rename(aside)
    b.rename(a)
    aside.rename(b)


def edit_attributes(path: Path, change: Callable[[dict], None]) -> None:
    metadata = json.loads((path / "zarr.json").read_text())
    change(metadata["attributes"]["occfeat"])
    (path / "zarr.json").write_text(json.dumps(metadata))


def edit_grid(path: Path) -> None:
    """Write another grid of the same size in bytes, with its fingerprint."""
    spec = replace(small_spec(), grid=VoxelGrid((4, 20, 12), (-2, -20, -12), (2, 20, 12)))
    edit_attributes(path, lambda a: a.update(spec=spec.to_dict(), fingerprint=spec.fingerprint))


def edit_strings(path: Path, value: str) -> None:
    array = zarr.open_array(path, mode="r+")
    values = array[:]
    values[3] = value
    array[:] = values


def edit_token(path: Path) -> None:
    edit_strings(path / "sample_token", "token4")


@pytest.mark.parametrize(
    "edit",
    [
        edit_grid,
        edit_token,
        lambda path: edit_strings(path / "scene", "scene-0103"),
        lambda path: edit_attributes(path, lambda a: a.update(provenance={"simulated": ["something else"]})),
        lambda path: edit_attributes(path, lambda a: a.update(keyframes_per_shard=4)),
    ],
    ids=["grid", "token", "scene", "provenance", "shard size"],
)
def test_edited_metadata_are_found_by_the_records_even_if_their_digests_were_updated(finished_cache, edit):
    edit(finished_cache.path)
    with pytest.raises(CacheError, match="was changed since the cache was created"):
        open_cache(finished_cache.path)
    update_digests(finished_cache.path)
    opened = open_cache(finished_cache.path)
    with pytest.raises(CacheError, match="is not the record of this shard.*metadata were edited: restore them"):
        CacheReader(opened)
    found = problems(opened)
    assert found and all("is not the record of this shard" in problem for problem in found)


def test_absurd_numbers_of_keyframes_are_refused_before_they_are_read(small_cache):
    """Also by a hand that updated the digests."""
    for name in ("sample_token", "timestamp_us"):
        file = small_cache.path / name / "zarr.json"
        before = file.read_text()
        metadata = json.loads(before)
        metadata["shape"] = [10**15]
        metadata["chunk_grid"]["configuration"]["chunk_shape"] = [10**15]
        file.write_text(json.dumps(metadata))
        update_digests(small_cache.path)
        with pytest.raises(
            CacheError, match=rf"{name}/zarr.json says that the array's shape is \(10+,\), but .* 7 keyframes"
        ):
            open_cache(small_cache.path)
        file.write_text(before)


def test_a_fingerprint_that_differs_from_the_specs_is_refused(small_cache):
    edit_attributes(small_cache.path, lambda a: a.update(fingerprint="0123456789abcdef"))
    update_digests(small_cache.path)
    with pytest.raises(
        CacheError, match=f"says fingerprint 0123456789abcdef, its spec has {small_cache.spec.fingerprint}"
    ):
        open_cache(small_cache.path)


def test_a_spec_of_another_release_is_refused(small_cache):
    edit_attributes(small_cache.path, lambda a: a["spec"].update(wings=2))
    update_digests(small_cache.path)
    with pytest.raises(CacheError, match="was not written by this release of occfeat, .*wings"):
        open_cache(small_cache.path)


def update_digests(path: Path) -> None:
    """Write the current digests of its files to created.json."""
    created = path / "progress" / "created.json"
    write_record(created, {"files": {name: digest(path / name) for name in read_record(created)["files"]}})


@pytest.mark.parametrize("name", ["sample_token", "scene", "timestamp_us"])
def test_a_cache_without_the_identity_of_its_keyframes_is_not_opened(finished_cache, name):
    (finished_cache.path / name / "c" / "0").unlink()
    with pytest.raises(CacheError, match=f"{name}/c/0 is missing or was changed"):
        open_cache(finished_cache.path)


@pytest.mark.parametrize("name", ["status", "info", "preview"])
def test_every_command_refuses_a_cache_with_missing_files_of_finished_shards(finished_cache, tmp_path, name):
    shard_file(finished_cache.path, finished_cache.spec.arrays()[0], 1).unlink()
    found = command(name, finished_cache, *(["--out", str(tmp_path / "preview")] if name == "preview" else []))
    assert found.returncode == 1
    lost = "is_valid/c/1 is damaged" if name == "preview" else "lost 1 file of finished shards (is_valid/c/1): restore"
    assert lost in found.stderr
    (problem,) = problems(finished_cache)
    assert (
        f"{finished_cache.path / 'is_valid/c/1'} is missing: restore it, or delete the record of its shard" in problem
    )

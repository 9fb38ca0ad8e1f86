import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray
import zarr

from occfeat_targets.cache import create as create_module
from occfeat_targets.cache import store as store_module
from occfeat_targets.cache.create import create_cache
from occfeat_targets.cache.opening import open_cache
from occfeat_targets.cache.records import CacheError, read_record, write_record
from occfeat_targets.cache.shards import shard_file
from occfeat_targets.cache.store import Cache
from tests.conftest import random_arrays, small_identity, small_spec
from tests.kills import unflushed_renames

NOTES = {"skipped": {}, "cosine": None}


def contents(path: Path) -> dict[str, np.ndarray]:
    group = zarr.open_group(path, mode="r")
    return {name: array[:] for name, array in group.members(max_depth=None) if isinstance(array, zarr.Array)}


def create(path: Path, **changes):
    arguments = {"spec": small_spec(), "identity": small_identity(), "keyframes_per_shard": 3, **changes}
    return create_cache(path, provenance={"simulated": []}, **arguments)


def test_zarr_and_xarray_read_what_was_written(finished_cache):
    expected = {a.name: [] for a in finished_cache.spec.arrays()}
    for shard in range(finished_cache.num_shards):
        for name, values in random_arrays(finished_cache, shard).items():
            expected[name].append(values)
    found = contents(finished_cache.path)
    dataset = xarray.open_zarr(finished_cache.path)
    labels = xarray.open_zarr(finished_cache.path, group="labels")
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], np.concatenate(values))
        opened = labels[name.removeprefix("labels/")] if name.startswith("labels/") else dataset[name]
        np.testing.assert_array_equal(opened.values, np.concatenate(values))
    assert dataset["sample_token"].values.tolist() == list(finished_cache.identity.tokens)
    assert dataset["features"].dims == ("keyframe", "camera", "token_y", "token_x", "channel")


def test_every_chunk_is_checksummed_and_a_shard_is_one_file(finished_cache):
    for array in finished_cache.spec.arrays():
        metadata = (finished_cache.path / array.name / "zarr.json").read_text()
        assert "crc32c" in metadata, array.name
        for shard in range(finished_cache.num_shards):
            assert shard_file(finished_cache.path, array, shard).is_file()


def test_an_opened_cache_equals_the_created_one(small_cache):
    again = open_cache(small_cache.path)
    assert again == small_cache
    assert again.pending_shards() == [0, 1, 2]


def test_a_finished_shard_is_not_pending_and_its_record_names_its_files(small_cache):
    small_cache.write_shard(1, random_arrays(small_cache, 1), NOTES)
    assert small_cache.pending_shards() == [0, 2]
    record = small_cache.finished_shards()[1]
    assert record["keyframes"] == [3, 6]
    assert set(record["files"]) == {str(shard_file(Path(), array, 1)) for array in small_cache.spec.arrays()}


def test_keyframes_of_zeros_are_written(small_cache):
    arrays = {name: np.zeros_like(values) for name, values in random_arrays(small_cache, 2).items()}
    small_cache.write_shard(2, arrays, NOTES)
    for array in small_cache.spec.arrays():
        assert shard_file(small_cache.path, array, 2).stat().st_size > 0


def test_renamed_files_and_folders_are_on_disk_when_a_cache_is_created_and_a_shard_written(tmp_path, monkeypatch):
    assert unflushed_renames(lambda: create(tmp_path / "t.zarr"), monkeypatch) == []
    cache = open_cache(tmp_path / "t.zarr")
    for seed in (0, 1):
        arrays = random_arrays(cache, 1, seed)
        assert unflushed_renames(lambda arrays=arrays: cache.write_shard(1, arrays, NOTES), monkeypatch) == []


def test_a_finished_shard_that_was_changed_is_not_read(finished_cache):
    file = shard_file(finished_cache.path, finished_cache.spec.arrays()[4], 0)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CacheError, match=r"was changed after it was written: delete .*00000.json and run"):
        finished_cache.read_shard(0)


def test_another_fingerprint_is_refused_with_both_named(small_cache):
    other = small_spec(num_sweeps=3)
    with pytest.raises(CacheError) as error:
        create(small_cache.path, spec=other)
    assert other.fingerprint in str(error.value)
    assert small_cache.spec.fingerprint in str(error.value)
    assert "num_sweeps: 1 != 3" in str(error.value)


def test_other_keyframes_and_another_shard_size_are_refused(small_cache):
    with pytest.raises(CacheError, match="other keyframes"):
        create(small_cache.path, identity=small_identity(8))
    with pytest.raises(CacheError, match="--shard-size 3"):
        create(small_cache.path, keyframes_per_shard=4)


def test_zero_keyframes_and_shard_size_zero_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no keyframes"):
        create(tmp_path / "x.zarr", identity=small_identity(0))
    with pytest.raises(ValueError, match="at least 1"):
        create(tmp_path / "x.zarr", keyframes_per_shard=0)


def test_a_missing_cache_is_reported_with_the_caches_that_exist(small_cache):
    with pytest.raises(CacheError, match=r"no cache at .*val\.zarr \(splits there: train\)"):
        open_cache(small_cache.path.with_name("val.zarr"))


def test_a_cache_without_its_metadata_or_record_of_creation_is_not_called_absent(small_cache):
    """Deleting the record of creation, as advised for those of shards, would make the cache unreadable."""
    record = small_cache.path / "progress" / "created.json"
    record.write_text("{}")
    with pytest.raises(CacheError, match=r"created\.json is damaged: restore it, or pass --overwrite"):
        open_cache(small_cache.path)
    (small_cache.path / "zarr.json").unlink()
    with pytest.raises(CacheError, match=r"train\.zarr/zarr\.json is missing: restore it, or pass --overwrite"):
        open_cache(small_cache.path)


def test_drafts_of_builders_with_equal_process_ids_have_different_names(tmp_path, monkeypatch):
    """Host names may be equal, too, as those of two containers that are copies."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    monkeypatch.setattr(socket, "gethostname", lambda: "node-3")
    write, drafts = create_module._write_skeleton, []

    def note(draft: Path, cache: Cache) -> None:
        drafts.append(draft.name)
        write(draft, cache)

    monkeypatch.setattr(create_module, "_write_skeleton", note)
    for _ in range(2):
        create(tmp_path / "t.zarr")
        shutil.rmtree(tmp_path / "t.zarr")
    assert all(name.startswith(".t.zarr.creating-node-3-7-") for name in drafts)
    assert drafts[0] != drafts[1]


def _create_in_process(path: Path, barrier) -> None:
    """Creates a cache as a process of id 7, which it has in its container."""
    getpid, os.getpid = os.getpid, lambda: 7
    barrier.wait()
    try:
        create(path)
    finally:
        os.getpid = getpid


@pytest.mark.slow
def test_processes_of_equal_ids_that_create_the_same_cache_at_once_all_succeed(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(4)
    processes = [context.Process(target=_create_in_process, args=(tmp_path / "t.zarr", barrier)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert [p.name for p in tmp_path.iterdir()] == ["t.zarr"]
    assert len(open_cache(tmp_path / "t.zarr")) == 7


def test_changed_metadata_is_found_on_opening(small_cache):
    metadata = small_cache.path / "features" / "zarr.json"
    metadata.write_text(metadata.read_text().replace("float16", "float32"))
    with pytest.raises(CacheError, match="features/zarr.json is missing or was changed"):
        open_cache(small_cache.path)


def test_a_record_that_cannot_be_written_leaves_the_old_one_and_no_other_file(tmp_path, monkeypatch):
    file = tmp_path / "r.json"
    write_record(file, {"shard": 3})

    def refuse(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space left"):
        write_record(file, {"shard": 4})
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
    assert read_record(file) == {"shard": 3}


def test_a_shard_that_two_processes_build_at_once_is_not_blamed_on_the_disk(small_cache, monkeypatch):
    """Each takes the other's draft for the leftover of a killed build, and removes it."""
    write = store_module.chunk_checksums

    def remove_draft(*args):
        small_cache.settle_drafts([1])
        return write(*args)

    monkeypatch.setattr(store_module, "chunk_checksums", remove_draft)
    with pytest.raises(CacheError, match=r"could not write shard 1 .* is missing.*: another process may build it"):
        small_cache.write_shard(1, random_arrays(small_cache, 1), NOTES)


def test_a_record_with_any_byte_changed_is_damaged(tmp_path):
    file = tmp_path / "r.json"
    write_record(file, {"shard": 3, "files": {"a": "b"}})
    good = file.read_bytes()
    assert read_record(file) == {"shard": 3, "files": {"a": "b"}}
    for position in range(len(good)):
        damaged = bytearray(good)
        damaged[position] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(CacheError, match="damaged"):
            read_record(file)


def test_a_failure_is_recorded_until_the_shard_succeeds(small_cache):
    small_cache.record_failure(1, "no such sweep")
    assert small_cache.failed_shards()[1]["error"] == "no such sweep"
    small_cache.write_shard(1, random_arrays(small_cache, 1), NOTES)
    assert small_cache.failed_shards() == {}


def test_a_full_disk_is_an_error_that_leaves_finished_shards_intact(tmp_path):
    """The disk is a small tmpfs. Skipped where none can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("a tmpfs can't be mounted here")
    try:
        cache = create(disk / "t.zarr", spec=small_spec(image_size=(64, 256)))
        cache.write_shard(0, random_arrays(cache, 0), NOTES)
        before = contents(cache.path)
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - 200_000))
        with pytest.raises(CacheError, match=r"shard 1 .*No space left.*Finished shards are intact"):
            cache.write_shard(1, random_arrays(cache, 1), NOTES)
        assert open_cache(cache.path).pending_shards() == [1, 2]
        np.testing.assert_array_equal(contents(cache.path)["images"][:3], before["images"][:3])
        (disk / "filler").unlink()
        cache.write_shard(1, random_arrays(cache, 1), NOTES)
        assert cache.pending_shards() == [2]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_cache_modules_import_no_heavy_library():
    """Readers of a cache need neither devkit, Dask, numba nor torch."""
    code = (
        "import sys\n"
        "import occfeat_targets.cache.grid, occfeat_targets.cache.geometry, occfeat_targets.cache.spec\n"
        "import occfeat_targets.cache.store, occfeat_targets.cache.reader\n"
        "bad = {'nuscenes', 'dask', 'distributed', 'numba', 'torch', 'transformers', 'cv2', 'shapely', 'PIL', 'simplejpeg', 'matplotlib', 'jinja2'}\n"
        "print(sorted(bad & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

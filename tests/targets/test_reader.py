import pickle

import google_crc32c
import numpy as np
import pytest
import zarr

from occfeat_targets.cache.reader import CacheReader
from occfeat_targets.cache.records import CacheError
from occfeat_targets.cache.shards import shard_file
from tests.conftest import random_arrays


def array_named(cache, name):
    return next(a for a in cache.spec.arrays() if a.name == name)


def test_reader_returns_what_was_written_for_every_array_and_keyframe(finished_cache):
    reader = CacheReader(finished_cache.path)
    for shard in range(finished_cache.num_shards):
        expected = random_arrays(finished_cache, shard)
        for row, keyframe in enumerate(finished_cache.shard_range(shard)):
            for name, values in reader.read_all(list(expected), keyframe).items():
                np.testing.assert_array_equal(values, expected[name][row], err_msg=f"{name} {keyframe}")


def test_reader_fills_a_given_array(finished_cache):
    batch = np.zeros((4, 6, 2, 3, 8), np.float16)
    reader = CacheReader(finished_cache)
    out = reader.read("features", 5, out=batch[1])
    assert np.shares_memory(out, batch)
    np.testing.assert_array_equal(batch[1], random_arrays(finished_cache, 1)["features"][2])
    assert not batch[[0, 2, 3]].any()
    with pytest.raises(ValueError, match="C-contiguous"):
        reader.read("features", 5, out=batch[0].astype(np.float32))


def test_reader_survives_pickling(finished_cache):
    reader = CacheReader(finished_cache)
    reader.read("features", 0)
    again = pickle.loads(pickle.dumps(reader))
    np.testing.assert_array_equal(again.read("images", 6), reader.read("images", 6))


def test_an_unfinished_cache_is_refused_unless_allowed(small_cache):
    small_cache.write_shard(0, random_arrays(small_cache, 0), {"skipped": {}})
    with pytest.raises(CacheError, match="2 of 3 shards are missing"):
        CacheReader(small_cache)
    reader = CacheReader(small_cache, allow_incomplete=True)
    assert reader.read("features", 2).any()
    for name in ("features", "intrinsics"):
        with pytest.raises(CacheError, match=r"keyframe 3 \(sample token3\) .* is not built yet"):
            reader.read(name, 3)
    assert reader.is_valid.tolist() == [True] * 3 + [False] * 4


def test_a_chunk_removed_while_a_reader_is_open_is_an_error_in_every_array(finished_cache):
    """zarr-python would read zeros."""
    for array in finished_cache.spec.arrays():
        reader = CacheReader(finished_cache)
        file = shard_file(finished_cache.path, array, 1)
        file.rename(file.with_name("aside"))
        assert not zarr.open_array(finished_cache.path / array.name, mode="r")[3:6].any()
        with pytest.raises(CacheError, match=f"{array.name}/c/1.* is damaged at keyframe 3 .*No such file"):
            reader.read(array.name, 3)
        file.with_name("aside").rename(file)


@pytest.mark.parametrize("name", ["is_valid", "intrinsics", "cam_from_ego", "grid_from_ego"])
@pytest.mark.parametrize("change", ["swap", "flip", "truncate", "empty"])
def test_a_damaged_or_exchanged_chunk_of_a_small_array_is_an_error(finished_cache, name, change):
    """The chunk of another shard has a valid CRC-32C."""
    files = [shard_file(finished_cache.path, array_named(finished_cache, name), shard) for shard in (0, 1)]
    good = [file.read_bytes() for file in files]
    if name == "is_valid":
        good[0] = bytes(3) + google_crc32c.value(bytes(3)).to_bytes(4, "little")
    damaged = {"swap": good[0], "flip": bytes([good[1][0] ^ 1]) + good[1][1:], "truncate": good[1][:-5], "empty": b""}
    files[1].write_bytes(damaged[change])
    with pytest.raises(CacheError, match=f"{name}/c/1.* is damaged at keyframe 3 .*SHA-256"):
        CacheReader(finished_cache).read(name, 0)


@pytest.mark.parametrize("name", ["features", "images", "occupancy", "labels/map"])
def test_a_flipped_bit_anywhere_in_a_shard_is_never_read_as_data(finished_cache, name):
    file = shard_file(finished_cache.path, array_named(finished_cache, name), 1)
    good = file.read_bytes()
    expected = [CacheReader(finished_cache).read(name, k) for k in (3, 4, 5)]
    for position in np.random.default_rng(0).integers(0, len(good), 40):
        damaged = bytearray(good)
        damaged[position] ^= 0x10
        file.write_bytes(damaged)
        errors = 0
        for keyframe, values in zip((3, 4, 5), expected, strict=True):
            try:
                np.testing.assert_array_equal(CacheReader(finished_cache).read(name, keyframe), values)
            except CacheError as error:
                assert f"keyframe {keyframe}" in str(error)
                assert f"token{keyframe}" in str(error)
                errors += 1
        assert errors >= 1


def test_a_truncated_shard_is_an_error_naming_file_and_sample(finished_cache):
    file = shard_file(finished_cache.path, array_named(finished_cache, "images"), 2)
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(CacheError, match=r"images/c/2/0/0/0/0 is damaged at keyframe 6 \(sample token6\)"):
        CacheReader(finished_cache).read("images", 6)


@pytest.mark.parametrize(("check", "noticed"), [("first", False), ("always", True), ("never", False)])
def test_damage_after_the_first_read_is_found_only_with_check_always(finished_cache, check, noticed):
    reader = CacheReader(finished_cache, check=check)
    values = reader.read("features", 4)
    file = shard_file(finished_cache.path, array_named(finished_cache, "features"), 1)
    data = bytearray(file.read_bytes())
    data[data.index(values.tobytes())] ^= 1
    file.write_bytes(data)
    if noticed:
        with pytest.raises(CacheError, match="checksum"):
            reader.read("features", 4)
    else:
        assert (reader.read("features", 4) != values).sum() == 1
    if check != "never":
        with pytest.raises(CacheError, match="checksum"):
            CacheReader(finished_cache, check=check).read("features", 4)


def test_unknown_arrays_and_keyframes_are_refused(finished_cache):
    reader = CacheReader(finished_cache)
    with pytest.raises(CacheError, match="no array 'depth'"):
        reader.read("depth", 0)
    with pytest.raises(IndexError, match="keyframe 7 of a cache of 7"):
        reader.read("images", 7)
    assert len(reader) == 7
    assert reader.is_valid.all()


@pytest.mark.parametrize("name", ["features", "images", "occupancy", "labels/map"])
def test_the_file_of_another_shard_is_never_read_as_data(finished_cache, name):
    """Its own checksums are valid."""
    files = [shard_file(finished_cache.path, array_named(finished_cache, name), shard) for shard in (0, 1)]
    files[1].write_bytes(files[0].read_bytes())
    reader = CacheReader(finished_cache)
    assert reader.read(name, 2).any()
    for keyframe in (3, 4, 5):
        with pytest.raises(CacheError, match=f"{name}/c/1.* is damaged at keyframe {keyframe} .*shard's record"):
            reader.read(name, keyframe)

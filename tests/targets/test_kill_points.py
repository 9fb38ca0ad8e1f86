"""A cache whose writing is killed, or meets a full disk, at any of its file-system operations."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from occfeat_targets.cache.create import create_cache
from occfeat_targets.cache.opening import open_cache
from occfeat_targets.cache.records import digest
from occfeat_targets.cache.store import Cache
from occfeat_targets.verify.verify import verify_checksums
from tests.conftest import random_arrays, small_identity, small_spec
from tests.kills import interrupted_at

FULL = OSError(errno.ENOSPC, "No space left on device")
NOTES = {"skipped": {}, "cosine": None}


@pytest.fixture(autouse=True)
def no_flushing(monkeypatch):
    """It only matters for a loss of power, and takes most of the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def create(path: Path) -> Cache:
    spec = small_spec(teacher=None, labels=())
    return create_cache(path, spec, small_identity(), keyframes_per_shard=3, provenance={"simulated": []})


def files(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): digest(p) if p.is_file() else "" for p in folder.rglob("*")}


def which(cache: Cache, versions: Sequence[dict[str, np.ndarray]]) -> int:
    """The number of the version that shard 1 holds completely."""
    found = cache.read_shard(1)  # also checks the digests of its record
    (number,) = [i for i, v in enumerate(versions) if all((found[name] == v[name]).all() for name in found)]
    return number


@pytest.mark.slow
@pytest.mark.parametrize("error", [None, FULL], ids=["kill", "full disk"])
def test_a_shard_whose_rewriting_stops_anywhere_is_completely_the_old_or_the_new_one(tmp_path, error):
    cache = create(tmp_path / "whole.zarr")
    old, new = (random_arrays(cache, 1, seed) for seed in (0, 1))
    for shard in range(cache.num_shards):
        cache.write_shard(shard, random_arrays(cache, shard), NOTES)
    seen = set()
    for number in itertools.count(1):
        stopped = open_cache(Path(shutil.copytree(cache.path, tmp_path / "stopped.zarr")))
        if not interrupted_at(number, lambda cache=stopped: cache.write_shard(1, new, NOTES), error=error):
            break
        assert verify_checksums(stopped, progress=False).problems == []
        if 1 in stopped.finished_shards():  # readers never see a mixture
            which(stopped, (old, new))
        stopped.settle_drafts([1])  # as the next build does
        seen.add(which(stopped, (old, new)))
        assert stopped.pending_shards() == []
        left = set(files(stopped.path)) ^ set(files(cache.path))
        assert not left
        shutil.rmtree(stopped.path)
    assert number > 60
    assert seen == {0, 1}
    assert which(stopped, (new,)) == 0


@pytest.mark.slow
def test_a_new_shard_whose_writing_is_killed_anywhere_is_built_again(tmp_path):
    """Also if the earlier attempt failed, and the record of its failure was being written."""
    cache, arrays = create(tmp_path / "whole.zarr"), random_arrays(create(tmp_path / "whole.zarr"), 1)

    def build(cache: Cache) -> None:
        cache.settle_drafts([1])
        if cache.pending_shards() == [0, 1, 2]:
            cache.record_failure(1, "no such sweep")
            cache.write_shard(1, arrays, NOTES)

    undisturbed = open_cache(Path(shutil.copytree(cache.path, tmp_path / "undisturbed.zarr")))
    build(undisturbed)
    for number in itertools.count(1):
        stopped = open_cache(Path(shutil.copytree(cache.path, tmp_path / "stopped.zarr")))
        if not interrupted_at(number, lambda cache=stopped: build(cache)):
            break
        assert verify_checksums(stopped, progress=False).problems == []
        build(stopped)
        assert files(stopped.path) == files(undisturbed.path)
        shutil.rmtree(stopped.path)
    assert number > 60


@pytest.mark.slow
@pytest.mark.parametrize("error", [None, FULL], ids=["kill", "full disk"])
def test_a_cache_whose_creation_stops_anywhere_is_created_by_the_next_build(tmp_path, error):
    expected = files(create(tmp_path / "undisturbed" / "train.zarr").path)
    for number in itertools.count(1):
        path = tmp_path / "stopped" / "train.zarr"
        if not interrupted_at(number, lambda path=path: create(path), error=error):
            break
        cache = create(path)
        assert files(cache.path) == expected
        assert [p.name for p in path.parent.iterdir()] == [path.name]
        shutil.rmtree(path.parent)
    assert number > 50

"""Batches that threads read ahead."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import pytest
import torch

from occfeat_targets.cache.records import CacheError
from occfeat_targets.cache.shards import shard_file
from occfeat_train.data.prefetch import Prefetcher
from tests.train.test_dataset import contents, dataset_of, write_cache

CPU = torch.device("cpu")


def prefetch_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_arrive_in_the_requested_order(tmp_path, workers):
    dataset = dataset_of(write_cache(tmp_path))
    wanted = [[dataset.stream(i), dataset.stream(i + 1)] for i in range(0, 40, 2)]
    prefetcher = Prefetcher(dataset, wanted, CPU, workers=workers)
    tokens = [batch.tokens for batch in prefetcher]
    assert tokens == [tuple(f"token{keyframe}" for _, keyframe in samples) for samples in wanted]
    assert prefetcher.waited >= 0
    assert not prefetch_threads()


def test_a_damaged_chunk_is_an_error_at_its_batch_with_the_sample(tmp_path):
    cache = write_cache(tmp_path)
    image = contents(cache)["images"][4]
    file = shard_file(cache.path, next(a for a in cache.spec.arrays() if a.name == "images"), 1)
    damaged = bytearray(file.read_bytes())
    damaged[damaged.find(image.tobytes()) + 100] ^= 1
    file.write_bytes(damaged)
    seen = []
    with pytest.raises(CacheError, match=r"damaged at keyframe 4 \(sample token4\)"):
        for batch in Prefetcher(dataset_of(cache), ([(0, k)] for k in range(7)), CPU, workers=2):
            seen += batch.tokens
    assert seen == ["token0", "token1", "token2", "token3"]
    assert not prefetch_threads()


def test_a_closed_prefetcher_stops_its_threads_and_reads_no_further(tmp_path):
    asked = []

    def endless() -> Iterator[list[tuple[int, int]]]:
        for number in itertools.count():
            asked.append(number)
            yield [(number, number % 7)]

    batches = iter(Prefetcher(dataset_of(write_cache(tmp_path)), endless(), CPU, workers=2, ahead=3))
    assert next(batches).tokens == ("token0",)
    assert next(batches).tokens == ("token1",)
    assert prefetch_threads()
    batches.close()
    assert not prefetch_threads()
    assert len(asked) <= 5


def test_every_thread_selects_the_gpu_that_it_copies_to(tmp_path, monkeypatch):
    """Batches are not copied here: there may be no GPU."""
    device, selected = torch.device("cuda", 3), {}
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: selected.update({threading.get_ident(): device}))
    used = []
    dataset = dataset_of(write_cache(tmp_path))
    read = dataset.batch
    monkeypatch.setattr(
        dataset, "batch", lambda *given, **options: used.append(threading.get_ident()) or read(*given, **options)
    )
    batches = [[dataset.stream(i)] for i in range(6)]
    assert len(list(Prefetcher(dataset, batches, device, workers=2))) == 6
    assert set(used) <= set(selected)
    assert set(selected.values()) == {device}

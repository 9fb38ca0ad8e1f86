"""Disks that are full, too small or read-only."""

from __future__ import annotations

import shutil
from pathlib import Path

from occfeat_targets.cache.opening import open_cache
from tests.targets.command_line import assert_same_bytes, build_arguments, run, tmpfs


def test_a_read_only_output_is_an_error_that_says_so(city, tiny_teacher, tmp_path):
    with tmpfs(tmp_path / "read-only", "ro,size=1g") as output:  # root ignores permissions
        result = run(*build_arguments(city, output / "cache", tiny_teacher, "--workers", "0"), check=False)
        assert result.returncode == 1
        assert "could not write" in result.stderr
        assert "Read-only file system" in result.stderr


def test_a_disk_that_is_too_small_is_refused_before_anything_is_built(city, tiny_teacher, tmp_path):
    with tmpfs(tmp_path / "disk", "size=1m") as disk:
        result = run(*build_arguments(city, disk, tiny_teacher, "--workers", "0"), check=False)
        assert result.returncode == 1
        assert "the cache takes about" in result.stderr
        assert not list(disk.iterdir())


def remove_shard(cache: Path, shard: int) -> None:
    for name in open_cache(cache).finished_shards()[shard]["files"]:
        (cache / name).unlink()
    (cache / "progress" / f"{shard:05d}.json").unlink()


def test_a_disk_that_fills_up_keeps_the_finished_shards(city, tiny_teacher, tmp_path, expected):
    with tmpfs(tmp_path / "disk", "size=12m") as disk:
        arguments = build_arguments(city, disk, tiny_teacher, "--workers", "0", "--frames", "both")
        run(*arguments)
        for shard in (1, 3):  # as if not built yet, while something else fills the disk
            remove_shard(disk / "mini_train.zarr", shard)
        filler = disk / "filler"
        filler.write_bytes(bytes(shutil.disk_usage(disk).free - 300_000))
        result = run(*arguments, check=False)
        assert result.returncode == 1
        assert "No space left on device" in result.stdout
        assert set(open_cache(disk / "mini_train.zarr").finished_shards()) == {0, 2, 4}
        filler.unlink()
        run(*arguments)
        assert_same_bytes(disk, expected)

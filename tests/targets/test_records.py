"""Files of a cache, while other processes write it."""

from __future__ import annotations

import os
import shutil

import pytest

from occfeat_targets.cache.records import sizes_of_files


def test_sizes_of_files(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_bytes(b"123")
    (tmp_path / "d").write_bytes(b"")
    assert sizes_of_files(tmp_path) == {"a/b/c": 3, "d": 0}


@pytest.mark.parametrize("gone", ["folder", "file"])
def test_what_another_task_moves_meanwhile_is_left_out(tmp_path, monkeypatch, gone):
    """A task of an array job adds up its cache's files when it ends, while another renames the draft of a shard."""
    (tmp_path / "draft" / "images").mkdir(parents=True)
    (tmp_path / "draft" / "images" / "0").write_bytes(b"123")
    (tmp_path / "zarr.json").write_bytes(b"12")
    walk = os.walk

    def walk_beside_another_task(folder):
        for root, folders, names in walk(folder):
            if gone == "file" and root.endswith("images"):
                (tmp_path / "draft" / "images" / "0").unlink()
            yield root, folders, names
            if gone == "folder" and root == str(tmp_path):
                shutil.rmtree(tmp_path / "draft")

    monkeypatch.setattr(os, "walk", walk_beside_another_task)
    assert sizes_of_files(tmp_path) == {"zarr.json": 2}

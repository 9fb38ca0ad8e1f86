"""Reading of whole files: errors that pass, and those that do not."""

from __future__ import annotations

import errno

import pytest

from occfeat_targets.common import files
from occfeat_targets.common.files import read_file


@pytest.fixture
def attempts(monkeypatch):
    """Makes the next reads fail with the errors that are put into the list."""
    errors: list[int] = []
    pauses: list[float] = []
    plain = files._read_once

    def read(path, most):
        if errors:
            raise OSError(errors.pop(0), "failed")
        return plain(path, most)

    monkeypatch.setattr(files, "_read_once", read)
    monkeypatch.setattr(files.time, "sleep", pauses.append)
    return errors, pauses


def test_a_file_is_read_again_after_an_error_that_may_pass(tmp_path, attempts):
    errors, pauses = attempts
    (tmp_path / "file").write_bytes(b"content")
    errors += [errno.ESTALE, errno.EIO]
    assert read_file(tmp_path / "file", 100) == b"content"
    assert pauses == [1.0, 5.0]


def test_an_error_that_stays_is_raised_after_three_attempts(tmp_path, attempts):
    errors, pauses = attempts
    errors += [errno.EIO] * 3
    with pytest.raises(OSError, match="failed"):
        read_file(tmp_path / "file", 100)
    assert not errors and len(pauses) == 2


def test_a_missing_file_is_an_error_at_once(tmp_path, attempts):
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "file", 100)
    assert attempts[1] == []

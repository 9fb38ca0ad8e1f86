"""Errors of what a run writes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError


class CheckpointError(ValueError):
    """A checkpoint or run directory that is absent, damaged or of another kind. The message says what to do."""


def first_line(err: BaseException) -> str:
    return (str(err).strip() or type(err).__name__).splitlines()[0]


@contextlib.contextmanager
def saving(what: str | Path) -> Iterator[None]:
    """Turn an error of the disk into a CheckpointError that says what was not written."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as err:
        # torch.save raises another error after the disk's
        cause = err.__context__ if isinstance(err, RuntimeError) else err
        if not isinstance(cause, OSError | SafetensorError):
            raise
        reason = (isinstance(cause, OSError) and cause.strerror) or first_line(cause)
        raise CheckpointError(
            f"could not write {what}: {reason}. Saved checkpoints are intact: free disk space or correct the permissions, then "
            "run the same command again"
        ) from err

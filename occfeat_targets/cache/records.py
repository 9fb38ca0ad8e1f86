"""JSON records with their own checksum, and digests of files. All writes are atomic, and durable when they return."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import google_crc32c


class CacheError(ValueError):
    """A cache that is absent, incomplete, damaged or of another kind. The message says what to do."""


def digest(file: Path) -> str:
    """SHA-256 of a file, in hex. (CRC-32C would not do: all files that end in their own CRC-32C have the same one.)"""
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file to disk, or the names in a directory. A new or renamed file is only safe with its directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_and_digest(file: Path) -> str:
    """Flush a file to disk. Returns its SHA-256."""
    sync(file)
    return digest(file)


def unique_suffix() -> str:
    """Of a name that no other process uses at the same time: host, process id, and a random part.

    Containers that share a file system may have equal process ids, and even equal host names.
    """
    return f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:12]}"


def write_file(file: Path, content: bytes) -> None:
    """Write a file atomically. A kill leaves the old one, and at most a file that `is_partial`."""
    partial = file.with_name(f".{file.name}.{unique_suffix()}.partial")
    try:
        with partial.open("wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        partial.replace(file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync(file.parent)


def is_partial(name: str) -> bool:
    """Whether a file or folder of this name is not finished, or is being deleted."""
    return name.startswith(".") and name.endswith(".partial")


def delete_folder(folder: Path) -> None:
    """Delete a folder at once. What a kill leaves of it `is_partial`."""
    shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.deleted.partial")))


def sizes_of_files(folder: Path) -> dict[str, int]:
    """{path relative to the folder: bytes} of all files below it, without those that another process moves or deletes meanwhile."""
    sizes = {}
    for root, _, names in os.walk(str(folder)):  # leaves out folders that are gone
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                sizes[os.path.relpath(os.path.join(root, name), folder)] = os.stat(os.path.join(root, name)).st_size
    return sizes


def write_record(file: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON record with its own checksum, atomically."""
    write_file(file, _record_bytes(record))


def read_record(file: Path) -> dict[str, Any]:
    """A record of a cache that write_record wrote. Raises CacheError if it is absent or was changed."""
    try:
        data = file.read_bytes()
        record: dict[str, Any] = json.loads(data)
        record.pop("crc32c")
        if _record_bytes(record) == data:
            return record
    except FileNotFoundError:
        raise CacheError(f"{file} is missing: this cache was not made by occfeat-targets, or lost files") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        pass
    if file.stem.isdigit():
        raise CacheError(f"{file} is damaged: delete it, and 'occfeat-targets build' rebuilds that shard")
    raise CacheError(
        f"{file} is damaged: restore it, or pass --overwrite to 'occfeat-targets build' to replace the cache"
    )


def _record_bytes(record: Mapping[str, Any]) -> bytes:
    body = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return (
        json.dumps({"crc32c": google_crc32c.value(body.encode()), **record}, sort_keys=True, indent=1).encode() + b"\n"
    )


@contextlib.contextmanager
def writing(what: str, if_gone: str = "correct the path, then run the same command again") -> Iterator[None]:
    """Turn an OSError into a CacheError that says what was being written and what to do. if_gone: what, if a file is missing."""
    try:
        yield
    except FileNotFoundError as err:
        raise CacheError(
            f"could not write {what}: {err.filename or 'a file'} is missing. Finished shards are intact: {if_gone}"
        ) from err
    except OSError as err:
        raise CacheError(
            f"could not write {what}: {err.strerror or err}. Finished shards are intact: free disk space or correct the permissions, "
            "then run the same command again to continue"
        ) from err

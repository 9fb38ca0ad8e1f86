"""Where a cache or a run comes from: command, code, machine, date and library versions, saved with it."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def describe_origin(packages: Iterable[str], gpus: Iterable[str] = ()) -> dict[str, Any]:
    """command, date (UTC), host, Python, commit (`find_commit`), {package: version} of the installed ones, names of GPUs."""
    return {
        "command": shlex.join(sys.argv),
        "date": timestamp(),
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "commit": find_commit(),
        "packages": {name: version for name in ("occfeat", *packages) if (version := _version(name)) is not None},
        "gpus": list(gpus),
    }


def describe_code(origin: Mapping[str, Any]) -> str:
    """``occfeat 0.1.0, commit 3c38a71dc1 with changes``, from `describe_origin`; "unknown" if it was not recorded."""
    release, commit = origin.get("packages", {}).get("occfeat"), origin.get("commit")
    parts = [f"occfeat {release}"] if release else []
    if commit:
        changed = " with changes" if commit.endswith("-dirty") else ""
        parts.append(f"commit {commit[:10]}{changed}")
    return ", ".join(parts) or "unknown"


def timestamp() -> str:
    """Now in UTC, such as ``2026-11-27T02:31:49.123+00:00``."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def find_commit() -> str | None:
    """Commit of the git checkout that this package is in, with ``-dirty`` if it has changes; None if it is in none."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # a wheel may be installed below another project's checkout
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

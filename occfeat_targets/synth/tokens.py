"""Names that depend on nothing but the seed and what they name."""

from __future__ import annotations

import hashlib

import numpy as np


def token(*parts: str | int) -> str:
    """32 hexadecimal digits, as nuScenes' tokens are."""
    return hashlib.md5("/".join(map(str, parts)).encode(), usedforsecurity=False).hexdigest()


def stream(*parts: str | int) -> np.random.Generator:
    """A random generator of its own for every name: drawing from one never shifts another."""
    return np.random.default_rng(int(token(*parts), 16))

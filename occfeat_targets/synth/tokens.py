"""Tokens and random generators that depend only on the seed and a name."""

from __future__ import annotations

import hashlib

import numpy as np


def token(*parts: str | int) -> str:
    """32 hexadecimal digits, as nuScenes' tokens are."""
    return hashlib.md5("/".join(map(str, parts)).encode(), usedforsecurity=False).hexdigest()


def stream(*parts: str | int) -> np.random.Generator:
    """A separate random generator for every name, so that their random numbers are independent."""
    return np.random.default_rng(int(token(*parts), 16))

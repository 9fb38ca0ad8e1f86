"""Numbers of things in messages of both command lines."""

from __future__ import annotations


def count(n: float, noun: str) -> str:
    """1 keyframe, 2 keyframes, 1,000 keyframes, 0.5 epochs."""
    number = f"{n:,}" if isinstance(n, int) else f"{n:g}"
    return f"{number} {noun}{'' if n == 1 else 's'}"

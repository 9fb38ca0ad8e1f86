"""float16 conversions inside numba, over every float16 there is and every tie between two."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest

from occfeat_train.ops import half

CONVERSIONS = [
    "portable",
    pytest.param("native", marks=pytest.mark.skipif(not half.NATIVE, reason="no such processor")),
]


def converters(kind: str) -> tuple[Any, Any]:
    """(float16 bits -> float32, float32 -> float16 bits) over arrays."""
    to_float, to_half = getattr(half, f"_{kind}_to_float"), getattr(half, f"_{kind}_to_half")

    @numba.njit
    def floats_of(halves: np.ndarray, out: np.ndarray) -> None:
        for i in range(halves.size):
            out[i] = to_float(halves[i])

    @numba.njit
    def halves_of(floats: np.ndarray, out: np.ndarray) -> None:
        for i in range(floats.size):
            out[i] = to_half(floats[i])

    return floats_of, halves_of


@pytest.mark.parametrize("kind", CONVERSIONS)
def test_every_half_converts_exactly(kind: str) -> None:
    halves = np.arange(2**16, dtype=np.uint16)
    expected = halves.view(np.float16).astype(np.float32)
    floats = np.empty(2**16, np.float32)
    converters(kind)[0](halves, floats)
    np.testing.assert_array_equal(floats, expected)  # NaN equals NaN here
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(floats[number].view(np.uint32), expected[number].view(np.uint32))  # -0 is -0


@pytest.mark.parametrize("kind", CONVERSIONS)
def test_floats_round_to_the_nearest_half_and_ties_to_even(kind: str) -> None:
    exact = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    exact = np.sort(exact[np.isfinite(exact)])
    ties = (exact[:-1] + exact[1:]) / 2
    above, below = (np.nextafter(ties, np.float32(to)) for to in (np.inf, -np.inf))
    extreme = np.array([65519.99, 65520, 1e38, np.inf, -np.inf, np.nan, 1e-45, -1e-30, -0.0], np.float32)
    floats = np.concatenate([exact, ties, above, below, extreme]).astype(np.float32)
    halves = np.empty(floats.size, np.uint16)
    converters(kind)[1](floats, halves)
    with np.errstate(over="ignore"):
        expected = floats.astype(np.float16)
    np.testing.assert_array_equal(halves.view(np.float16), expected)
    number = ~np.isnan(floats)
    np.testing.assert_array_equal(halves[number], expected[number].view(np.uint16))

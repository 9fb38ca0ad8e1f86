"""Numba kernels of deformable attention on a CPU, forward and backward; used by `deformable`.

The channels of a head are contiguous float32. A call processes a range of queries (forward) or one head of one sample
(backward), and releases the GIL, so that `in_threads` can run several calls.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from occfeat_targets.common.compiled import compiled
from occfeat_train.ops.mean_over_views_numba import bilinear_taps

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@numba.njit(inline="always")
def _softmax(places: Any, weights: Any) -> None:
    """weights[p] = softmax over p of a query's and head's scores places[p, 2]."""
    highest = places[0, 2]
    for p in range(weights.size):
        highest = max(highest, places[p, 2])
    total = np.float32(0)
    for p in range(weights.size):
        weights[p] = np.exp(places[p, 2] - highest)
        total += weights[p]
    for p in range(weights.size):
        weights[p] /= total


@compiled(error_model="numpy", fastmath={"contract"})
def weighted_samples(
    values: Floats,  # (M, h * w, heads, d)
    size: tuple[int, int],  # h, w
    places: Floats,  # (Q, heads, P, 3): offset's column and row, score
    starts: Ints,  # (Q + 1,)
    anchors: Floats,  # (n, A, 2)
    maps: Ints,  # (n,)
    queries: tuple[int, int],  # first, and one past the last
    out: Floats,  # (Q, heads, d), of these queries
) -> None:
    """out[query, head] = sum over the query's pairs and over p of weight * the map at anchor p % A + offset p."""
    h, w = size
    heads, points, d = places.shape[1], places.shape[2], values.shape[3]
    num_anchors = anchors.shape[1]
    total, weights = np.empty(d, np.float32), np.empty(points, np.float32)
    for q in range(queries[0], queries[1]):
        for head in range(heads):
            _softmax(places[q, head], weights)
            total[:] = 0
            for pair in range(starts[q], starts[q + 1]):
                tokens = values[maps[pair]]
                for p in range(points):
                    x = anchors[pair, p % num_anchors, 0] + places[q, head, p, 0]
                    y = anchors[pair, p % num_anchors, 1] + places[q, head, p, 1]
                    if not ((x > -1) & (x < w) & (y > -1) & (y < h)):
                        continue
                    (i0, i1, i2, i3), (left, right, upper, lower), inside = bilinear_taps(x, y, h, w)
                    w0, w1 = weights[p] * upper * left * inside[0], weights[p] * upper * right * inside[1]
                    w2, w3 = weights[p] * lower * left * inside[2], weights[p] * lower * right * inside[3]
                    t0, t1, t2, t3 = tokens[i0, head], tokens[i1, head], tokens[i2, head], tokens[i3, head]
                    for c in range(d):
                        total[c] += (w0 * t0[c] + w1 * t1[c]) + (w2 * t2[c] + w3 * t3[c])
            out[q, head] = total


@compiled(error_model="numpy", fastmath={"contract", "reassoc"})
def weighted_samples_backward(
    grad: Floats,  # (Q, heads, d)
    values: Floats,  # (M, h * w, heads, d)
    size: tuple[int, int],  # h, w
    places: Floats,  # (Q, heads, P, 3)
    starts: Ints,  # (Q + 1,)
    anchors: Floats,  # (n, A, 2)
    maps: Ints,  # (n,)
    queries: tuple[int, int],  # first, and one past the last
    head: int,
    grad_values: Floats,  # (M, h * w, heads, d) zeros, of this head
    grad_places: Floats,  # (Q, heads, P, 3) zeros, of these queries and this head
) -> None:
    """Gradients of `weighted_samples`. Concurrent calls must not share both a head and the maps of their queries."""
    h, w = size
    points, d, num_anchors = places.shape[2], values.shape[3], anchors.shape[1]
    weights = np.empty(points, np.float32)
    for q in range(queries[0], queries[1]):
        g, own = grad[q, head], grad_places[q, head]
        _softmax(places[q, head], weights)
        for pair in range(starts[q], starts[q + 1]):
            tokens, targets = values[maps[pair]], grad_values[maps[pair]]
            for p in range(points):
                x = anchors[pair, p % num_anchors, 0] + places[q, head, p, 0]
                y = anchors[pair, p % num_anchors, 1] + places[q, head, p, 1]
                if not ((x > -1) & (x < w) & (y > -1) & (y < h)):
                    continue
                (i0, i1, i2, i3), (left, right, upper, lower), inside = bilinear_taps(x, y, h, w)
                weight = weights[p]
                t0, t1, t2, t3 = tokens[i0, head], tokens[i1, head], tokens[i2, head], tokens[i3, head]
                s0 = s1 = s2 = s3 = np.float32(0)
                for c in range(d):
                    s0 += g[c] * t0[c]
                    s1 += g[c] * t1[c]
                    s2 += g[c] * t2[c]
                    s3 += g[c] * t3[c]
                s0, s1, s2, s3 = s0 * inside[0], s1 * inside[1], s2 * inside[2], s3 * inside[3]
                own[p, 0] += weight * (upper * (s1 - s0) + lower * (s3 - s2))
                own[p, 1] += weight * (left * (s2 - s0) + right * (s3 - s1))
                own[p, 2] += upper * (left * s0 + right * s1) + lower * (left * s2 + right * s3)
                w0, w1 = weight * upper * left * inside[0], weight * upper * right * inside[1]
                w2, w3 = weight * lower * left * inside[2], weight * lower * right * inside[3]
                a0, a1, a2, a3 = targets[i0, head], targets[i1, head], targets[i2, head], targets[i3, head]
                # one after another: beside the map two of them are the same row
                for c in range(d):
                    a0[c] += w0 * g[c]
                for c in range(d):
                    a1[c] += w1 * g[c]
                for c in range(d):
                    a2[c] += w2 * g[c]
                for c in range(d):
                    a3[c] += w3 * g[c]
        mean = np.float32(0)  # from here through the softmax
        for p in range(points):
            mean += weights[p] * own[p, 2]
        for p in range(points):
            own[p, 2] = weights[p] * (own[p, 2] - mean)


def in_threads(work: Callable[[Any], None], tasks: list[Any]) -> None:
    """Run all tasks in as many threads as torch uses. Threads of a call (0.1 ms) also exist in a forked process.

    Numba's own threads would reset torch's number of threads (OpenMP), or fail when two threads enter (workqueue).
    """
    with ThreadPoolExecutor(min(torch.get_num_threads(), len(tasks)) or 1) as pool:
        list(pool.map(work, tasks))

"""Drawing on a bird's-eye map: polygons with holes by cell centre, polylines by distance. Numba, one thread.

Vertices are continuous (w, h) cells: cell ``i`` covers ``[i, i + 1)`` and its centre lies at ``i + 0.5``
(``VoxelGrid.cells_from_grid``). Drawing sets cells of a bool map in place and never clears one, so shapes are
OR-ed. Shapes outside the map cost only a bounding-box test.

OpenCV is not used: it paints every boundary pixel (an 8 x 4 box becomes 9 x 5), its thick lines are 3 to 5 pixels
wide for a nominal 2, and its lines changed between 4.11 and 5.0, so that labels would depend on its version.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from occfeat_targets.common.compiled import compiled

Mask = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@compiled()
def _first_cell(x: float, num_cells: int) -> int:
    """The first of num_cells cells whose centre is at or beyond x; num_cells if there is none or x is NaN."""
    if x <= 0.5:
        return 0
    if x <= num_cells - 0.5:
        return math.ceil(x - 0.5)
    return num_cells


@compiled()
def _fill_ring(window: Mask, top: int, left: int, ring: Floats, value: bool) -> None:
    """Set the cells whose centre is in a ring to `value`; `window` is the part of the map from cell (top, left) on."""
    rows, columns = window.shape
    first_row = max(_first_cell(ring[:, 1].min(), top + rows), top)
    last_row = _first_cell(ring[:, 1].max(), top + rows)
    first_column = max(_first_cell(ring[:, 0].min(), left + columns), left)
    last_column = _first_cell(ring[:, 0].max(), left + columns)
    if first_row >= last_row or first_column >= last_column:
        return
    # In each row whose centre line it crosses, an edge toggles the first cell beyond the crossing. Cells with odd running
    # parity are inside.
    toggles = np.zeros((last_row - first_row, last_column - first_column + 1), np.bool_)
    for i in range(len(ring)):
        w0, h0 = ring[i - 1]
        w1, h1 = ring[i]
        # Lower end first: polygons that share an edge in opposite directions must find the same crossings.
        if h0 > h1:
            w0, h0, w1, h1 = w1, h1, w0, h0
        start = max(_first_cell(h0, last_row), first_row)
        stop = _first_cell(h1, last_row)
        if start >= stop:
            continue
        slope = (w1 - w0) / (h1 - h0)
        for row in range(start, stop):
            column = _first_cell(w0 + (row + 0.5 - h0) * slope, last_column)
            toggles[row - first_row, max(column, first_column) - first_column] ^= True
    for row in range(first_row, last_row):
        inside = False
        for column in range(first_column, last_column):
            inside ^= toggles[row - first_row, column - first_column]
            if inside:
                window[row - top, column - left] = value


@compiled()
def fill_polygon(mask: Mask, vertices: Floats, ring_offsets: Ints) -> int:
    """Draw one polygon: the cells whose centre is in its exterior ring and in none of its holes.

    mask: (H, W) bool, drawn on; vertices: (v, 2) float64 (w, h) [cells]; ring_offsets: (r + 1,), ring i is
    ``vertices[ring_offsets[i]:ring_offsets[i + 1]]``, the exterior first; open or closed, either direction.
    Returns the number of cells inside, including those drawn before.

    Rings use the even-odd rule and are half-open on their upper and right sides, so polygons that share vertices tile
    the plane without overlaps and gaps. Holes are cut only from this polygon, not from earlier ones.
    """
    exterior = vertices[ring_offsets[0] : ring_offsets[1]]
    if len(exterior) == 0:
        return 0
    height, width = mask.shape
    top, bottom = _first_cell(exterior[:, 1].min(), height), _first_cell(exterior[:, 1].max(), height)
    left, right = _first_cell(exterior[:, 0].min(), width), _first_cell(exterior[:, 0].max(), width)
    if top >= bottom or left >= right:
        return 0
    window = np.zeros((bottom - top, right - left), np.bool_)
    for i in range(len(ring_offsets) - 1):
        if ring_offsets[i] < ring_offsets[i + 1]:
            _fill_ring(window, top, left, vertices[ring_offsets[i] : ring_offsets[i + 1]], i == 0)
    count = 0
    for row in range(window.shape[0]):
        for column in range(window.shape[1]):
            if window[row, column]:
                mask[top + row, left + column] = True
                count += 1
    return count


@compiled()
def fill_polygons(masks: Mask, channels: Ints, vertices: Floats, ring_offsets: Ints, polygon_offsets: Ints) -> None:
    """Draw p polygons, each into its channel.

    masks: (K, H, W) bool, drawn on; channels: (p,) in 0..K-1; vertices: (v, 2) float64 (w, h) [cells];
    ring_offsets: (r + 1,) into vertices; polygon_offsets: (p + 1,) into the rings, exteriors first.
    """
    for i in range(len(channels)):
        rings = ring_offsets[polygon_offsets[i] : polygon_offsets[i + 1] + 1]
        if len(rings) > 1:
            fill_polygon(masks[channels[i]], vertices, rings)


@compiled()
def _draw_segment(mask: Mask, start: Floats, stop: Floats, size_w: float, size_h: float, radius: float) -> None:
    """Set the cells whose centre is within `radius` metres of a segment between two (w, h) cell positions."""
    height, width = mask.shape
    x0, y0 = start[0] * size_w, start[1] * size_h
    dx, dy = stop[0] * size_w - x0, stop[1] * size_h - y0
    squared_length = dx * dx + dy * dy
    for row in range(
        _first_cell((min(y0, y0 + dy) - radius) / size_h, height),
        min(_first_cell((max(y0, y0 + dy) + radius) / size_h, height) + 1, height),
    ):
        y = (row + 0.5) * size_h
        # Only the part of the segment within `radius` of this row's centre line can reach its cells.
        enter, leave = 0.0, 1.0
        if dy != 0:
            a, b = (y - radius - y0) / dy, (y + radius - y0) / dy
            enter, leave = max(0.0, min(a, b)), min(1.0, max(a, b))
        x_enter, x_leave = x0 + enter * dx, x0 + leave * dx
        for column in range(
            _first_cell((min(x_enter, x_leave) - radius) / size_w, width),
            min(_first_cell((max(x_enter, x_leave) + radius) / size_w, width) + 1, width),
        ):
            x = (column + 0.5) * size_w
            t = 0.0
            if squared_length > 0:
                t = min(max(((x - x0) * dx + (y - y0) * dy) / squared_length, 0.0), 1.0)
            if (x0 + t * dx - x) ** 2 + (y0 + t * dy - y) ** 2 <= radius * radius:
                mask[row, column] = True


@compiled()
def draw_polylines(
    masks: Mask,
    channels: Ints,
    vertices: Floats,
    line_offsets: Ints,
    size_w: float,
    size_h: float,
    line_width: float,
) -> None:
    """Draw n polylines, each into its channel: the cells whose centre is within line_width / 2 of the line.

    masks: (K, H, W) bool, drawn on; channels: (n,) in 0..K-1; vertices: (v, 2) float64 (w, h) [cells];
    line_offsets: (n + 1,), line i is ``vertices[line_offsets[i]:line_offsets[i + 1]]``; size_w, size_h: edges
    of a cell [m], which need not be equal; line_width [m]. Joints and ends are round.
    """
    for i in range(len(channels)):
        for j in range(line_offsets[i], line_offsets[i + 1] - 1):
            _draw_segment(masks[channels[i]], vertices[j], vertices[j + 1], size_w, size_h, line_width / 2)

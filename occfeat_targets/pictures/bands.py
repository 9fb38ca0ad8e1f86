"""Sheets as bands from top to bottom: text, headings with colour bars, and whatever else draws itself."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure

from occfeat_targets.pictures.canvas import DPI, place

MARGIN = 20  # [px]
PANEL, RULER = 600, 60  # [px] of a bird's-eye picture, and left of it for its ruler
COLUMNS = 3  # of bird's-eye pictures
WIDTH = COLUMNS * (PANEL + RULER) + 2 * MARGIN
Band = tuple[float, Callable[[SubFigure], None]]  # height [px] of a part of the sheet, and what draws it


def stack(bands: Sequence[Band]) -> Figure:
    """A sheet of WIDTH px with the bands from top to bottom."""
    heights = [height for height, _ in bands]
    sheet = Figure((WIDTH / DPI, sum(heights) / DPI), DPI, facecolor="white")
    parts = sheet.subfigures(len(bands), 1, height_ratios=heights, hspace=0, squeeze=False)[:, 0]
    for part, (_, draw) in zip(parts, bands, strict=True):
        draw(part)
    return sheet


def text_band(text: str, size: float, *, margin: float = 8, color: str = "#111", background: str = "none") -> Band:
    """Lines of text of `size` points over the whole width."""
    pixels = size * DPI / 72
    lines = textwrap.wrap(text, int((WIDTH - 2 * MARGIN) / (0.65 * pixels)))  # more than the mean width of a character

    def draw(part: SubFigure) -> None:
        part.set_facecolor(background)
        at = (MARGIN / WIDTH, 0.5)
        part.text(*at, "\n".join(lines), size=size, color=color, va="center", linespacing=1.25, parse_math=False)

    return 1.25 * pixels * len(lines) + 2 * margin, draw


def warning_bands(warnings: Sequence[str]) -> list[Band]:
    """What is simulated, in white on red."""
    return [text_band(text, 18, color="white", background="#c8201c") for text in warnings]


def heading_band(text: str, scale: ScalarMappable | None = None) -> Band:
    """A heading, and the colour bar of a scale in metres."""

    def draw(part: SubFigure) -> None:
        part.text(MARGIN / WIDTH, 0.3, text, size=14, va="center")
        if scale is not None:
            color_bar(part, scale, MARGIN + 620, 30)

    return 52, draw


def color_bar(part: SubFigure, scale: ScalarMappable, left: float, top: float, unit: str = " m") -> None:
    """A colour bar with its values, each followed by the unit, above it."""
    bar = place(part, left, top, 420, 12)
    assert isinstance(scale.norm, Normalize)
    part.colorbar(scale, cax=bar, orientation="horizontal", ticks=scale.norm.inverse(np.linspace(0, 1, 6)))
    bar.minorticks_off()
    bar.xaxis.set_ticks_position("top")
    bar.xaxis.set_major_formatter("{x:g}" + unit)
    bar.tick_params(labelsize=10, pad=1, length=3)


def beside(height: float, *parts: tuple[float, Callable[[SubFigure], None]]) -> Band:
    """A band of (width [px], what draws it) from left to right, which fill WIDTH."""

    def draw(part: SubFigure) -> None:
        widths = [width for width, _ in parts]
        columns = part.subfigures(1, len(parts), width_ratios=widths, wspace=0, squeeze=False)[0]
        for column, (_, draw_column) in zip(columns, parts, strict=True):
            draw_column(column)

    return height, draw

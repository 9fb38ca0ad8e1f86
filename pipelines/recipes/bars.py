"""Bar charts: Figures 1 and 4."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from occfeat_targets.pictures.canvas import default_style, png


@dataclass(frozen=True)
class Bars:
    """One bar for each group. values: None is left out and marked. spreads: error bars; None for none. hatched: the paper's."""

    name: str
    color: str
    values: Sequence[float | None]
    spreads: Sequence[float | None]
    hatched: bool = False


@default_style()
def draw_bars(title: str, groups: Sequence[str], bars: Sequence[Bars]) -> bytes:
    """A PNG of bars side by side in groups, with their values [%]."""
    figure = Figure((0.6 + 0.38 * len(groups) * len(bars), 3.0), 150, layout="constrained")
    axes = figure.add_subplot()
    width = 0.84 / len(bars)
    for k, each in enumerate(bars):
        for group, (value, spread) in enumerate(zip(each.values, each.spreads, strict=True)):
            x = group + (k - (len(bars) - 1) / 2) * width
            if value is None:
                axes.text(x, 0, "missing", ha="center", va="bottom", rotation=90, size=7, color=each.color)
                continue
            fill = "none" if each.hatched else each.color
            axes.bar(
                x,
                value,
                0.9 * width,
                yerr=spread,
                facecolor=fill,
                edgecolor=each.color,
                capsize=3,
                hatch="///" * each.hatched,
            )
            axes.text(x, value + (spread or 0), f"{value:.1f}", ha="center", va="bottom", size=7)
        axes.bar(
            0,
            0,
            label=each.name,
            facecolor="none" if each.hatched else each.color,
            edgecolor=each.color,
            hatch="///" * each.hatched,
        )
    axes.set_xticks(range(len(groups)), groups, fontsize=8)
    axes.margins(y=0.12)
    axes.set_ylabel("IoU at 0.5 [%]", size=9)
    axes.set_title(title, size=10, parse_math=False)
    figure.legend(fontsize=8, ncols=len(bars), loc="outside lower center", frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return png(figure)

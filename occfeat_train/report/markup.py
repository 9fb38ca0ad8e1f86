"""HTML of the report: embedded pictures, legends, tables, and one style sheet for screen, phone and print."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

import numpy as np

from occfeat_targets.cache.grid import VoxelGrid
from occfeat_train.report import figures


def picture(png: bytes, alt: str, kind: str = "") -> str:
    data = base64.b64encode(png).decode()
    return f'<img class="{kind}" alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def row_of(pictures: Sequence[tuple[bytes, str]], legend: str) -> str:
    figure = "".join(f"<div>{picture(png, caption)}<p>{html.escape(caption)}</p></div>" for png, caption in pictures)
    return f'<figure class="row">{figure}<figcaption>{legend}</figcaption></figure>'


def key(colors: dict[str, figures.RGB]) -> str:
    return " ".join(f"{swatch('#' + bytes(color).hex())}&nbsp;{html.escape(name)}" for name, color in colors.items())


def height_key(grid: VoxelGrid) -> str:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    steps = ",".join(to_hex(colormaps[figures.HEIGHTS](x)) for x in np.linspace(0, 1, 6))
    return f'Height {grid.lower[0]:g} m <i class="ramp" style="background:linear-gradient(90deg,{steps})"></i> {grid.upper[0]:g} m.'


def swatch(color: str) -> str:
    return f'<i class="swatch" style="background:{color}"></i>'


def percent(value: float | None) -> str:
    return number(value, 1)


def number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"  # noqa: RUF001


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; cells of the body are HTML already."""
    head = "".join(f"<th>{html.escape(text)}</th>" for text in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


STYLE = (
    "body{background:#fff;color:#1a1a1a;font:16px/1.45 system-ui,sans-serif;max-width:1240px;margin:auto;padding:1rem}"
    "h2{border-top:2px solid #ddd;padding-top:1rem;margin-top:2rem}h3{margin-bottom:.3rem}h4{margin:.6rem 0 .2rem}"
    "small{color:#666;font-weight:normal}"
    ".simulated{background:#c8201c;color:#fff;font-size:1.2rem;font-weight:bold;padding:.5rem 1rem;"
    "print-color-adjust:exact;-webkit-print-color-adjust:exact}"
    ".scaled{border-left:6px solid #c8201c;padding:.1rem 1rem}"
    ".row{display:flex;flex-wrap:wrap;gap:.6rem;margin:.4rem 0;align-items:flex-start}"
    ".row img{width:275px;max-width:100%;height:auto}.row img.wide{width:auto}.row div{max-width:275px;break-inside:avoid}"
    ".row p{margin:0;font-size:.85rem}figcaption{flex-basis:100%;font-size:.85rem;color:#444}"
    ".swatch,.ramp{display:inline-block;width:.8em;height:.8em;border:1px solid #999;"
    "print-color-adjust:exact;-webkit-print-color-adjust:exact}.ramp{width:6em}"
    ".table{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem;margin:.5rem 0}"
    "th,td{padding:.3rem .35rem;border-bottom:1px solid #ddd;text-align:right;vertical-align:bottom}"
    "th:first-child,td:first-child{text-align:left;white-space:nowrap}"
    "@media print{table{font-size:.65rem}h2,h3,h4{break-after:avoid}}"
)

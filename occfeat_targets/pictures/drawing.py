"""Drawing of a preview: text, banners, colour bars, legends, and dots on an image."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from occfeat_targets.pictures.colors import ALARM, FAINT, INK, PAPER, RGB, Colors, ColorScale

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
BAR_WIDTH, BAR_HEIGHT = 240, 14  # [px]


@functools.cache
def font(size: int) -> Font:
    """Pillow's built-in font, which needs no font file."""
    return ImageFont.load_default(size=size)


def wrap(text: str, width: int, size: int) -> list[str]:
    """Lines of `text` that are at most `width` px wide in a font of `size` px; a longer word gets its own line."""
    lines: list[str] = []
    for word in text.split():
        if lines and font(size).getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def draw_lines(sheet: Image.Image, left: int, top: int, lines: list[str], size: int, color: RGB = INK) -> int:
    """Write lines of text; returns the y below them [px]."""
    for line in lines:
        ImageDraw.Draw(sheet).text((left, top), line, color, font(size))
        top += size * 4 // 3
    return top


def draw_banner(sheet: Image.Image, top: int, lines: list[str], size: int = 24) -> int:
    """A red banner over the whole width; returns the y below it [px]."""
    bottom = top + size * 4 // 3 * len(lines) + 16
    ImageDraw.Draw(sheet).rectangle([0, top, sheet.width - 1, bottom - 1], ALARM)
    draw_lines(sheet, 16, top + 8, lines, size, (255, 255, 255))
    return bottom


def draw_scale(sheet: Image.Image, left: int, top: int, scale: ColorScale) -> int:
    """A colour bar with its name and end values; returns the x to its right [px]."""
    draw = ImageDraw.Draw(sheet)
    for text, color in ((scale.name, INK), (f"{scale.low:g}", FAINT)):
        draw.text((left, top), text, color, font(16))
        left += int(font(16).getlength(text)) + 10
    values = np.linspace(scale.low, scale.high, BAR_WIDTH)
    bar = np.broadcast_to(scale.colors(values), (BAR_HEIGHT, BAR_WIDTH, 3))
    sheet.paste(Image.fromarray(np.ascontiguousarray(bar)), (left, top + 3))
    draw.text((left + BAR_WIDTH + 8, top), f"{scale.high:g} m", FAINT, font(16))
    return left + BAR_WIDTH + 70


def draw_key(sheet: Image.Image, left: int, top: int, width: int, entries: Mapping[str, RGB]) -> int:
    """Swatches with their names, in as many rows as they need; returns the y below [px]."""
    draw, x = ImageDraw.Draw(sheet), left
    for name, color in entries.items():
        needed = 22 + int(font(15).getlength(name))
        if x > left and x + needed > left + width:
            x, top = left, top + 22
        draw.rectangle([x, top + 3, x + 14, top + 15], color, FAINT)
        draw.text((x + 20, top), name, INK, font(15))
        x += needed + 18
    return top + 22


def draw_tag(image: Image.Image, text: str) -> None:
    """A caption in the upper left corner of a picture."""
    draw = ImageDraw.Draw(image)
    draw.rectangle([0, 0, int(font(15).getlength(text)) + 11, 21], PAPER)
    draw.text((6, 1), text, INK, font(15))


def draw_dots(
    image: Image.Image,
    pixels: NDArray[Any],
    depth: NDArray[Any],
    colors: Colors,
    radius: NDArray[Any],
    *,
    rim: float = 0,
) -> None:
    """Draw dots on a picture, the nearest last.

    pixels: (n, 2) continuous (u, v) of it, pixel i covering [i, i+1); depth: (n,) [m]; colors: (n, 3); radius: (n,) [px].
    rim: width [px] of the black rim around every dot.
    """
    draw = ImageDraw.Draw(image)
    for i in np.argsort(-depth, kind="stable"):
        for reach, color in ((radius[i] + rim, (0, 0, 0)), (radius[i], tuple(colors[i].tolist())))[rim == 0 :]:
            bounds = np.rint([*(pixels[i] - 0.5 - reach), *(pixels[i] - 0.5 + reach)])  # Pillow would round down
            draw.ellipse(bounds.tolist(), color)

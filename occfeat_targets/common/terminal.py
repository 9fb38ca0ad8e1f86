"""Text for the terminal, in which names of files, scenes and tokens are only text."""

from __future__ import annotations

import sys


def printable(text: str) -> str:
    """The text with all characters that a terminal does not show as they are, such as ESC, as \\x1b. Line ends and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def echo(text: str, *, err: bool = False) -> None:
    """Print text that may hold names from a data set, a cache or the file system."""
    print(printable(text), file=sys.stderr if err else sys.stdout, flush=True)

"""Names that a user may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable


def did_you_mean(name: str, names: Iterable[str], *, key: Callable[[str], str] = str) -> str:
    """`: did you mean A or B?` with up to three of the names that resemble a name that is none of them; empty if none does.

    key: the part of a name that is compared.
    """
    parts = [(key(other), other) for other in names]
    close = difflib.get_close_matches(key(name), [part for part, _ in parts], cutoff=0.75)
    chosen = [other for match in dict.fromkeys(close) for part, other in parts if part == match]
    return f": did you mean {' or '.join(chosen)}?" if chosen else ""

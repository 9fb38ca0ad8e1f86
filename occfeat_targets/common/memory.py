"""A lack of the host's memory as text."""

from __future__ import annotations


def describe_shortage(err: BaseException) -> str | None:
    """What a MemoryError, or torch's RuntimeError for the host's memory, says; None for other errors."""
    text = str(err).partition("\n")[0]
    if isinstance(err, RuntimeError) and "can't allocate memory: " in text:
        text = text.partition("can't allocate memory: ")[2]
    elif not isinstance(err, MemoryError):
        return None
    return "this machine has too little memory" + (f" ({text})" if text else "")

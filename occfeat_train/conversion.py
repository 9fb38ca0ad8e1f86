"""Frozen dataclasses from dictionaries and from text, with every value checked against its annotation."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Sequence
from typing import Any, Literal

from occfeat_targets.common.suggest import did_you_mean


def build(cls: Any, data: Any, where: str) -> Any:
    """A dataclass from nested dictionaries, with every value checked against its annotation."""
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(data) - set(hints))
    if unknown:
        raise ValueError(
            f"unknown fields {', '.join(where + u for u in unknown)}: this config was written by another release"
        )
    return cls(**{name: _convert(hints[name], value, where + name) for name, value in data.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(hint, value, f"{where}.")
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    fits = False
    if origin is tuple:
        fits = isinstance(value, list | tuple) and len(value) == len(args)
        value = tuple(_convert(a, v, where) for a, v in zip(args, value, strict=True)) if fits else value
    elif origin is Literal:
        return value  # the class checks it and lists the allowed values
    elif hint is bool:
        fits = isinstance(value, bool)
    elif hint is int:
        fits = isinstance(value, int) and not isinstance(value, bool)
    elif hint is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        value = float(value) if fits else value
    elif hint is str:
        fits = isinstance(value, str)
    if not fits:
        wanted = str(hint) if args else hint.__name__
        raise ValueError(f"{where}={value!r}: a value of type {wanted} expected")
    return value


def require_one_of(value: Any, *names: str) -> None:
    hints = typing.get_type_hints(type(value))
    for name in names:
        allowed = typing.get_args(hints[name])
        given = getattr(value, name)
        if not any(type(given) is type(each) and given == each for each in allowed):  # 1 is not True
            raise ValueError(f"{name}={given!r}: one of {', '.join(map(str, allowed))} expected")


def assign(data: dict[str, Any], assignment: str, names: Sequence[str]) -> None:
    """Change nested dictionaries by ``key=value`` with a dotted key. names: of all fields. Raises ValueError if it is none of them."""
    key, equals, text = assignment.partition("=")
    if not equals:
        raise ValueError(f"--set {assignment}: key=value expected, such as --set optim.lr=1e-4")
    *groups, name = key.strip().split(".")
    target: Any = data
    for group in groups:
        target = target.get(group) if isinstance(target, dict) else None
    if not isinstance(target, dict) or name not in target or isinstance(target[name], dict):
        near = [other for other in names if other.split(".")[:-1] == groups] if groups else names
        close = did_you_mean(name, near, key=lambda other: other.rpartition(".")[2])
        remedy = close or f"; there are {', '.join(names)}"
        raise ValueError(f"--set {assignment}: no such field{remedy}")
    target[name] = parse_value(text.strip())


def parse_value(text: str) -> Any:
    """JSON, a size AxB, or a plain word; also Python's True and False."""
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except ValueError:
        parts = text.split("x")
        return [int(p) for p in parts] if len(parts) > 1 and all(p.isdigit() for p in parts) else text

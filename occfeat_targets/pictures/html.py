"""Rendering of HTML pages with Jinja2: the templates are the *.html files beside the modules."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def render(template: Path, **values: Any) -> str:
    """The template filled with values, which are escaped. It may extend this package's base.html, and embed a PNG with
    the filter `data_url`.

    Raises jinja2.UndefinedError if the template uses a value that is not given.
    """
    loader = FileSystemLoader([template.parent, Path(__file__).parent])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["data_url"] = data_url
    return environment.get_template(template.name).render(values)


def data_url(png: bytes) -> str:
    """A PNG as the address of an image, so that a page needs no other file."""
    return "data:image/png;base64," + base64.b64encode(png).decode()

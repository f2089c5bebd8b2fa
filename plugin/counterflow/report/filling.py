"""Fills the templates of pages: one HTML file without network, its data in one JSON element."""

import json
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from counterflow.report.colours import DARK, LIGHT

# A "<" or "&" in a title must not end the element that holds the JSON.
_ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


def fill_page(name: str, script: str, data: dict[str, Any], **values: Any) -> str:
    """Return the page of ``<name>.html`` with style and script of ``<script>.css`` and ``.js`` behind those that all pages share.

    ``data`` is what the script draws; ``values`` are the template's, escaped there.
    """
    environment = Environment(
        loader=FunctionLoader(_read), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(f"{name}.html").render(
        light=LIGHT,
        dark=DARK,
        style=Markup(_read("base.css") + _read(f"{script}.css")),
        script=Markup(_read("base.js") + _read(f"{script}.js")),
        data=Markup(json.dumps(data, separators=(",", ":"), allow_nan=False).translate(_ESCAPES)),
        **values,
    )


def _read(name: str) -> str:
    return files("counterflow.report").joinpath(name).read_text(encoding="utf-8")

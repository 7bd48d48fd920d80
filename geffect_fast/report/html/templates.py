"""Rendering of templates, and the values all of them share: level colours, script and policy."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from geffect_fast.report.tokens.colours import GROUND, INK, STEPS, UNDEFINED, colour
from geffect_fast.visible import visible


def render(template: str, **values: Any) -> str:
    """Render a template. Text from data is escaped, and its control characters are made visible."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("geffect_fast", "report/html"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    environment.filters["class_attribute"] = class_attribute
    environment.filters["interval_whole"] = interval_whole
    environment.globals.update(steps=range(1, STEPS + 1), colour=colour, ground=GROUND, ink=INK)
    script = files("geffect_fast.report.html").joinpath("tokens.js").read_text(encoding="utf-8")
    environment.globals.update(tokens_script=Markup(script), policy=policy(script))
    return environment


def policy(script: str) -> str:
    """The Content-Security-Policy of a page: no request to anywhere, and this script alone runs.

    Styles lie in the page itself, in elements and in attributes of drawings. Pictures lie in the
    page too, as `data:` addresses. Pictures and fonts from elsewhere, which styles could load, are
    not allowed.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def interval_whole(cell: str) -> Markup:
    """The HTML of a number. Its interval, where it has one, is not broken over lines."""
    value, opened, bounds = visible(cell).partition(" [")
    if not opened:
        return escape(value)
    return Markup('{} <span class="interval">[{}</span>').format(value, bounds)


def class_attribute(good: int) -> Markup:
    """The HTML attribute with the class of a goodness.

    `w1` to `w9` is wanted, `x1` to `x9` unwanted, `n` undefined. A goodness of 0 has no class.
    """
    if good == 0:
        return Markup()
    name = "n" if good == UNDEFINED else f"{'w' if good > 0 else 'x'}{abs(good)}"
    return Markup(' class="{}"').format(name)

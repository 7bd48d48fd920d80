"""Templates of pages, and what all of them know: the colours of levels."""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from geffect_fast.report.token_colours import GROUND, INK, STEPS, UNDEFINED, colour


def render(template: str, **values: Any) -> str:
    """A page; whatever comes from data is escaped."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("geffect_fast", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["class_attribute"] = class_attribute
    environment.globals.update(steps=range(1, STEPS + 1), colour=colour, ground=GROUND, ink=INK)
    return environment


def class_attribute(good: int) -> Markup:
    """The class of a level: `w1` to `w9` wanted, `x1` to `x9` unwanted, `n` undefined, or none."""
    if good == 0:
        return Markup()
    name = "n" if good == UNDEFINED else f"{'w' if good > 0 else 'x'}{abs(good)}"
    return Markup(' class="{}"').format(name)

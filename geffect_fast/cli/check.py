"""`geffect-fast check`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from geffect_fast.arguments import make_config
from geffect_fast.cli.options import (
    CHECK_FIELDS,
    PROFILE_FIELDS,
    config_options,
    described,
    option,
    option_names,
)
from geffect_fast.cli.printing import console

DEVIATION = 3
"""Exit code of a check that found a deviation."""


@config_options(CHECK_FIELDS)
def check(
    *,
    model: Annotated[str, option("--model", "-m", help=described(PROFILE_FIELDS["model"]))],
    data: Annotated[str, option("--data", "-d", help=described(PROFILE_FIELDS["forget"]))],
    samples: Annotated[int, typer.Option(help="Rows of the data, the first ones.", min=1)] = 4,
    given: dict[str, Any],
    quiet: Annotated[bool, option("--quiet", "-q", help="The verdict alone.")] = False,
) -> None:
    """Compare every parameter's effects, norms and inner products with plain autograd.

    The comparison takes a few samples of your own data, one at a time: 8 backward passes for 4
    samples and one objective. It prints the largest error for each kind of layer, the parameters
    covered, and a verdict.
    """
    values = {"model": model, "forget": data, "retain": data, "objectives": ["ga"]} | given
    config = make_config(values, options=option_names(values, forget="--data"))

    from geffect_fast.measure.execute import execute_check
    from geffect_fast.report.tables.check import render_check, verdict

    found = execute_check(config, samples, progress=not quiet)
    if quiet:
        print(verdict(found))
    else:
        console().print(render_check(found))
    if not found.exact:
        raise typer.Exit(DEVIATION)

"""The token view as one HTML page, and the values that its template is filled with.

The page needs no network, and shows its first objective without a script.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from geffect_fast.report.format import number
from geffect_fast.report.html.templates import render
from geffect_fast.report.tokens.colours import SCALE_NOTE, STEPS, goodness, inline, mark
from geffect_fast.report.tokens.view import (
    STEP_NOTE,
    Answer,
    TokenView,
    heading,
    meaning,
    sequence_name,
    token_view,
    top_words,
)
from geffect_fast.results.risks import effect_name

if TYPE_CHECKING:
    import xarray as xr

N_SAMPLES = 20
MAX_VALUES = 150_000
"""The most numbers that a page holds, about twelve bytes each. It leaves the others out."""


def tokens_html(
    dataset: xr.Dataset,
    objective: str | None = None,
    *,
    samples: int | None = None,
    by: str | None = None,
    rows: Sequence[int | str] | None = None,
    max_values: int = MAX_VALUES,
) -> str:
    """The page of tokens coloured by e_u and by e_r, with maps by group and all objectives.

    Args:
        dataset: a result that `token_view` takes.
        objective: the objective shown first, which decides the order of samples; None: the first.
        samples: how many forget rows; None: 20.
        by, rows: as for `token_view`.
        max_values: how many numbers the page may hold. The page says what is left out.

    Raises:
        InputError: for the reasons that `token_view` gives.
    """
    view = token_view(
        dataset,
        objective,
        samples=N_SAMPLES if samples is None and rows is None else samples,
        by=by,
        rows=rows,
        all_objectives=True,
        max_values=max_values,
    )
    return render("token_view.html.jinja", **token_values(view, level=1))


def token_values(view: TokenView, level: int, script: bool = True) -> dict[str, Any]:
    """The values that the template of the token view is filled with.

    Args:
        view: the tokens.
        level: level of the view's heading.
        script: whether the page holds the script that chooses objectives. Without the script the
            view's first objective is shown.
    """
    return {
        "script": script,
        "view": view,
        "level": level,
        "risks": [_risk(view, m) for m in range(len(view.risks))],
        "objectives": [_objective(view, k) for k in range(len(view.objectives))],
        "strip": range(-STEPS, STEPS + 1, 3),
        "scale_note": SCALE_NOTE,
        "step_note": STEP_NOTE,
        "sequence_name": sequence_name,
        "inline": inline,
    }


def _risk(view: TokenView, m: int) -> dict[str, Any]:
    """The template's values for a risk: its words, and tokens under the first objective."""
    risk = view.risks[m]
    levels = view.levels(0, m)
    below, above = meaning(risk)
    return {
        "name": effect_name(risk),
        "below": below,
        "above": above,
        "top": top_words(risk),
        "good": [[goodness(risk, int(level)) for level in column] for column in levels],
        "marks": [[mark(risk, int(level)) for level in column] for column in levels],
        "effects": [[_exact(value) for value in column] for column in view.values[0, m]],
        "strip": {n: (goodness(risk, n), mark(risk, n)) for n in range(-STEPS, STEPS + 1, 3)},
    }


def _objective(view: TokenView, k: int) -> dict[str, Any]:
    """The values that change on the page with the objective, which the script reads as JSON."""
    answers, risks = view.answers, range(len(view.risks))
    return {
        "heading": heading(view, k),
        "scales": [number(float(scale), ".2g") for scale in view.scales[k]],
        "levels": [[_code(view.risks[m], column) for column in view.levels(k, m)] for m in risks],
        "values": [[_rounded(column) for column in view.values[k, m]] for m in risks],
        "totals": [[number(view.total(k, m, a), "+.3e") for a in answers] for m in risks],
        "top": [[_top(view, k, m, answer) for answer in answers] for m in risks],
    }


def _top(view: TokenView, k: int, m: int, answer: Answer) -> list[tuple[int, str]]:
    return [(i, f"{100 * share:.0f}%") for i, share in view.strongest(k, m, answer)]


def _code(risk: str, levels: np.ndarray) -> str:
    """Levels as a letter each: `a` most unwanted, `j` zero, `s` most wanted, `t` undefined."""
    return "".join(chr(ord("a") + STEPS + goodness(risk, int(level))) for level in levels)


def _exact(value: float) -> str:
    return number(value, "+.4e") if np.isfinite(value) else "not finite"


def _rounded(values: np.ndarray) -> list[float | None]:
    """Values with as many digits as `_exact` shows; None for NaN, which JSON does not know."""
    return [float(f"{value:.5g}") if np.isfinite(value) else None for value in values]

"""Numbers of the token view: the tokens that an objective attacks, and those that cost retention.

`tokens_text` and `tokens_html` present these numbers.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from geffect_fast.errors import InputError
from geffect_fast.report.tokens.colours import levels, robust_scale, visible
from geffect_fast.results.by_rows import sum_within_rows
from geffect_fast.results.risks import UNLEARN

if TYPE_CHECKING:
    import xarray as xr

FORGET, RETAIN = "forget", "retain"
N_SAMPLES = 5
ORDERS = {"first": None, "removal": UNLEARN, "damage": "retain"}
"""The orders of samples, and the risk whose effect orders them, the most negative first."""

N_STRONGEST, LEAST = 4, -0.005
"""The most tokens that are named as the strongest, and the share above which none is named."""

STEP_NOTE = "A descent step of size lr changes a risk by -lr·e."


@dataclass(frozen=True)
class Answer:
    """One sample of a view.

    Attributes:
        row: number of the sample in its data set.
        data: name of the data set, `forget` or `retain`.
        question: the question, on one line.
        sequences: places of the answer and then of its alternatives on the view's token axis, by
            number, 0 for the answer.
    """

    row: int
    data: str
    question: str
    sequences: dict[int, slice]

    @property
    def tokens(self) -> slice:
        """The place of all its sequences on the view's token axis."""
        parts = [*self.sequences.values()] or [slice(0, 0)]
        return slice(parts[0].start, parts[-1].stop)


@dataclass(frozen=True)
class TokenView:
    """Effects of a few samples by token. The tokens of all samples lie on one axis of length n.

    Attributes:
        objectives: labels of K objectives, the chosen one first.
        risks: names of M risks.
        columns: `""`, the sum over groups, and then the groups if the result tells them apart.
        answers: the samples.
        ids: `(n,)` token ids.
        texts: n texts, made visible.
        values: effects `(K, M, len(columns), n)` fp64.
        scales: `(K, M)`, the size that full colour stands for, for each objective and risk.
        n_rows: number of forget rows of the result.
        left_out: sentences on samples and objectives that did not fit.
    """

    objectives: tuple[str, ...]
    risks: tuple[str, ...]
    columns: tuple[str, ...]
    answers: tuple[Answer, ...]
    ids: np.ndarray
    texts: tuple[str, ...]
    values: np.ndarray
    scales: np.ndarray
    n_rows: int
    left_out: tuple[str, ...]

    def levels(self, objective: int, risk: int) -> np.ndarray:
        """Levels of colour, `(len(columns), n)`, as `colours.levels` gives them."""
        return levels(self.values[objective, risk], float(self.scales[objective, risk]))

    def total(self, objective: int, risk: int, answer: Answer) -> float:
        """The sum of the effects of an answer's tokens."""
        return float(self.values[objective, risk, 0, answer.tokens].sum())

    def strongest(self, objective: int, risk: int, answer: Answer) -> list[tuple[int, float]]:
        """The few tokens of most negative effect, which remove most or cost most.

        Returns:
            Places on the token axis, and shares of the answer's effects. The sizes of all tokens'
            shares add up to 1.
        """
        own = self.values[objective, risk, 0, answer.tokens]
        finite = np.where(np.isfinite(own), own, 0.0)
        order = np.argsort(finite, kind="stable")[:N_STRONGEST]
        size = np.abs(finite).sum()
        start = answer.tokens.start
        named = [int(i) for i in order if finite[i] < 0 and finite[i] <= LEAST * size]
        return [(start + i, float(finite[i] / size)) for i in named]


def has_tokens(dataset: xr.Dataset) -> bool:
    """Whether a result tells the tokens of samples apart."""
    return {"sample", "token"} <= set(dataset["g_effect"].dims)


def token_view(
    dataset: xr.Dataset,
    objective: str | None = None,
    *,
    samples: int | None = None,
    by: str | None = None,
    rows: Sequence[int | str] | None = None,
    all_objectives: bool = False,
    max_values: int | None = None,
) -> TokenView:
    """Read the tokens of a few samples under one objective, or under all objectives.

    Args:
        dataset: result of `geffect_fast.profile` with axes `sample` and `token`; may be lazy.
        objective: label of the objective; None: the first.
        samples: how many forget rows; None: 5.
        by: which forget rows: the `first`, those of strongest `removal` (lowest e_u) or those of
            most `damage` (lowest e_r); None: first.
        rows: in place of both, row numbers of the forget set, or `retain:3` for the retain set's.
        all_objectives: whether the view holds the other objectives too.
        max_values: how many numbers the view may hold. Samples, and then objectives, beyond that
            number are left out.

    Raises:
        InputError: the result has no token axis or several steps, there is no such objective,
            order or row, or the choices contradict each other.
    """
    if not has_tokens(dataset):
        raise InputError(
            "the result has no token axis; run geffect-fast profile --engine forward --resolve "
            "sample,token"
        )
    effect = dataset["g_effect"]
    if "step" in effect.dims:
        raise InputError("the result has several steps; choose one, such as .isel(step=-1)")
    chosen = _objective(effect, objective)
    places = _samples(effect, chosen, samples, by, rows)
    order = [
        chosen,
        *(k for k in range(effect.sizes["objective"]) if all_objectives and k != chosen),
    ]
    left_out = []
    if max_values is not None:
        n_columns = 1 + effect.sizes.get("group", 0)
        tokens = (effect["token_id"].isel(sample=places).values >= 0).sum(axis=1)
        sizes = effect.sizes["risk"] * n_columns * np.cumsum(tokens)
        fit = max(1, int((sizes <= max_values).sum()))
        if fit < len(places):
            left_out.append(f"{len(places) - fit} of {len(places)} samples left out: too large.")
            places = places[:fit]
        fit = max(1, int(max_values // max(1, sizes[fit - 1])))
        if fit < len(order):
            left_out.append(f"{len(order) - fit} of {len(order)} objectives left out: too large.")
            order = order[:fit]
    return _view(effect, order, places, tuple(left_out))


def _view(
    effect: xr.DataArray, order: list[int], places: list[int], left_out: tuple[str, ...]
) -> TokenView:
    shown = effect.isel(objective=order, sample=places)
    kept = [d for d in ("objective", "risk", "group", "sample", "token") if d in shown.dims]
    summed = [d for d in shown.dims if d not in kept]
    values = shown.sum(summed, skipna=False).transpose(*kept).values
    if "group" not in kept:
        values = values[:, :, None]
    else:
        values = np.concatenate([values.sum(2, keepdims=True), values], axis=2)
    ids = shown["token_id"].transpose("sample", "token").values
    texts = _texts(shown, ids)
    sequence = np.zeros_like(ids)
    if "sequence" in shown.coords:
        sequence = shown["sequence"].transpose("sample", "token").values
    data = _sets(shown)
    answers = []
    start = 0
    for i in range(len(places)):
        numbers = sequence[i][ids[i] >= 0]
        parts: dict[int, slice] = {}
        for number in np.unique(numbers):
            stop = start + int((numbers == number).sum())
            parts[int(number)] = slice(start, stop)
            start = stop
        question = str(shown["question"].values[i]) if "question" in shown.coords else ""
        asked = " ".join(question.split())
        row = int(shown["sample"].values[i])
        answers.append(Answer(row, str(data[i]), asked and visible(asked, 0), parts))
    real = ids >= 0
    values = values[..., real]
    return TokenView(
        objectives=tuple(str(o) for o in shown["objective"].values),
        risks=tuple(str(r) for r in shown["risk"].values),
        columns=("", *(str(g) for g in shown["group"].values)) if "group" in kept else ("",),
        answers=tuple(answers),
        ids=ids[real],
        texts=tuple(visible(t, int(i)) for t, i in zip(texts[real], ids[real], strict=True)),
        values=values,
        scales=np.array([[robust_scale(of_risk[0]) for of_risk in one] for one in values]),
        n_rows=int((_sets(effect) == FORGET).sum()),
        left_out=left_out,
    )


def _texts(effect: xr.DataArray, ids: np.ndarray) -> np.ndarray:
    if "token_text" not in effect.coords:
        return np.full(ids.shape, "", dtype=object)
    return effect["token_text"].transpose("sample", "token").values.astype(object)


def _sets(effect: xr.DataArray) -> np.ndarray:
    """The name of the data set of every sample."""
    if "set" not in effect.coords:
        return np.full(effect.sizes["sample"], FORGET, dtype=object)
    return effect["set"].values.astype(object)


def _objective(effect: xr.DataArray, label: str | None) -> int:
    """The index of an objective. Spaces and capitals in its label do not count."""
    known = [str(o) for o in effect["objective"].values]
    if label is None:
        return 0
    squeezed = ["".join(o.split()).lower() for o in known]
    wanted = "".join(label.split()).lower()
    if wanted in squeezed:
        return squeezed.index(wanted)
    heads = [o.partition("(")[0] for o in squeezed]
    begun = [k for k, o in enumerate(squeezed) if wanted and o.startswith(wanted)]
    close = difflib.get_close_matches(wanted, [*squeezed, *heads], n=1)
    begun += [[*squeezed, *heads].index(name) % len(known) for name in close]
    near = known[begun[0]] if begun else None
    few = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
    advice = f"did you mean {near!r}?" if near else f"it has {few}"
    raise InputError(f"objective {label!r} is not in the result; {advice}")


def _samples(
    effect: xr.DataArray,
    objective: int,
    samples: int | None,
    by: str | None,
    rows: Sequence[int | str] | None,
) -> list[int]:
    """Indices of the chosen samples on their axis."""
    if rows is not None:
        if samples is not None or by is not None:
            raise InputError("rows: name the samples; leave samples and by out")
        return _named(effect, rows)
    wanted = N_SAMPLES if samples is None else samples
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
        raise InputError(f"samples: got {samples!r}; give a whole number of at least 1")
    if by is not None and by not in ORDERS:
        raise InputError(f"by: unknown order {by!r}; choose from {', '.join(ORDERS)}")
    forget = np.flatnonzero(_sets(effect) == FORGET)
    risk = ORDERS[by or "first"]
    if risk is not None:
        one = effect.isel(objective=objective).sel(risk=risk)
        within = [str(d) for d in one.dims if d != "sample"]
        sums = sum_within_rows(one, within).values[forget]
        forget = forget[np.argsort(sums, kind="stable")]  # NaN last
    return [int(place) for place in forget[:wanted]]


def _named(effect: xr.DataArray, rows: Sequence[int | str]) -> list[int]:
    sets, numbers = _sets(effect), effect["sample"].values
    if not rows:
        raise InputError("rows: no row is named; give row numbers such as 3,7")
    return [_place(row, sets, numbers) for row in rows]


def _place(row: Any, sets: np.ndarray, numbers: np.ndarray) -> int:
    """The index of a row such as `3` or `retain:3` on the axis of samples."""
    data, colon, text = str(row).strip().rpartition(":")
    data = data if colon else FORGET
    own = numbers[sets == data]
    if not text.isdecimal() or data not in (FORGET, RETAIN):
        raise InputError(f"rows: {str(row)!r} is no row; give numbers such as 3, or retain:3")
    found = np.flatnonzero((sets == data) & (numbers == int(text)))
    if not found.size:
        has = f"has {own.min()} to {own.max()}" if own.size else "has none of that set"
        raise InputError(f"rows: there is no {data} row {text}; the result {has}; choose from them")
    return int(found[0])


def sequence_name(number: int) -> str:
    """The name of a sequence: `answer`, or `alternative` with its number."""
    return f"alternative {number}" if number else "answer"


def heading(view: TokenView, objective: int) -> str:
    """The heading of a view: its rows and its objective, in a line."""
    forget = sum(answer.data == FORGET for answer in view.answers)
    retain = len(view.answers) - forget
    parts = [f"{forget} of {view.n_rows} forget rows"] if forget else []
    parts += [f"{retain} retain row{'s' * (retain > 1)}"] if retain else []
    return f"Tokens of {' and '.join(parts) or 'no rows'} under {view.objectives[objective]}"


def meaning(risk: str) -> tuple[str, str]:
    """Words for what an effect below zero does, and for what one above zero does."""
    if risk == UNLEARN:
        return "removes (wanted)", "reinforces"
    return f"costs {_kept(risk)}", f"helps {_kept(risk)}"


def top_words(risk: str) -> str:
    """Words for what the tokens of most negative effect do."""
    return "remove most" if risk == UNLEARN else f"cost {_kept(risk)} most"


def _kept(risk: str) -> str:
    """The name of what an effect on a risk costs or helps."""
    return "retention" if risk == "retain" else risk

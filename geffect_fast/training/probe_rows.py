"""Which rows a probe measures: so many that it costs no more than a training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from geffect_fast.data import SampleSet
from geffect_fast.data.batch import Role
from geffect_fast.data.samples import evenly
from geffect_fast.objectives import GA, Objective
from geffect_fast.settings import Measuring

SHARE = 0.85
"""Of a training step, what a probe may cost by the count; copies of the weights and writing the
result, which are not counted, take the rest (benchmarks/bench_probe.py)."""

WEIGHT_PASS = 300
"""Forward passes over one token in whose time the parameters are read and multiplied once more:
whole gradients, their products, copies. Measured (benchmarks/bench_probe.py)."""

SIMPLEST = (GA(),)
"""Under what a training step is cheapest."""


@dataclass(frozen=True)
class ProbeRows:
    """The rows of every data set that probes measure, and what that costs.

    Attributes:
        rows: row numbers by data set, ascending, evenly spread.
        cost: of a probe in training steps, by the count of forward passes of docs/concepts.md.
    """

    rows: Mapping[str, Sequence[int]]
    cost: float

    def sentence(self, sets: Mapping[str, SampleSet]) -> str:
        """What a probe measures, for people."""
        counts = [f"{len(rows)} of {len(sets[name])} {name}" for name, rows in self.rows.items()]
        return (
            f"A probe measures {', '.join(counts)} rows, evenly chosen: about {self.cost:.2g} "
            "training steps' work."
        )


def choose_rows(
    sets: Mapping[str, SampleSet],
    wanted: int | str | None,
    *,
    trained: Sequence[Objective],
    measured: Sequence[Objective],
    settings: Measuring,
    rows_an_update: Mapping[str, int],
) -> ProbeRows:
    """The rows of a probe.

    Work is counted in tokens times forward passes. A training step takes 3 of its tokens (forward
    and backward with weight gradients); a probe by the reverse engine 3 of each risk's rows, and
    `1 + M + K` (with norms `1 + M + 2 K`) of the rows that K parts of objectives read, M risks; the
    forward engine takes `1 + 2 M` of the latter, and about `6 + 4.5 M` by groups of layers. Where
    it forms no whole gradients, effects in the optimizer's metric need `1 + 2 K` more for them. By
    sample, 1 more is for the rows of every risk but the forget risk, of which intervals need to
    know (`geffect_fast.results.risk_rows`). What rows do not decide is `1 + M + K` times
    `WEIGHT_PASS`.

    Args:
        sets: the data sets, whole: forget, retain, and probes by name.
        wanted: rows of each set, `all`, or None: as many as make a probe cost one training step at
            most (`SHARE` of it by this count), and one at least; no more than under `ga`, so that
            runs of several objectives measure the same rows and can be compared.
        trained: parts of the objective that is trained on.
        measured: parts of all objectives that are measured.
        settings: of the probe.
        rows_an_update: by data set, of training.
    """
    risk, resolve = settings.risk_objective, settings.resolve
    forward = settings.engine != "reverse" and not {"parameter", "position"} & set(resolve)

    def cost(
        rows: Mapping[str, Sequence[int]],
        trained: Sequence[Objective],
        measured: Sequence[Objective],
    ) -> float:
        step = 3 * sum(
            rows_an_update[name] * np.mean(_tokens(sets[name], roles))
            for name, roles in _reads(trained).items()
        )
        risks = sum(
            3 * _tokens(sets[name], risk.roles)[list(at)].sum() for name, at in rows.items()
        )
        effects = 0.0
        for name, roles in _reads(measured).items():
            k = sum(part.on == name for part in measured)
            passes: float = 1 + len(rows) + (k if settings.norms is False else 2 * k)
            if forward:
                passes = 6 + 4.5 * len(rows) if "group" in resolve else 1 + 2 * len(rows)
            if forward or settings.norms is False:
                passes += 1 + 2 * k
            effects += passes * _tokens(sets[name], roles)[list(rows[name])].sum()
        if "sample" in resolve:
            for name in rows.keys() - {"forget"}:
                risks += _tokens(sets[name], risk.roles)[list(rows[name])].sum()
        whole = WEIGHT_PASS * (1 + len(rows) + len(measured))
        return float((risks + effects + whole) / step)

    def found(n: int | None) -> ProbeRows:
        rows = {name: evenly(len(each), n) for name, each in sets.items()}
        return ProbeRows(rows, cost(rows, trained, measured))

    def fits(n: int) -> bool:
        probe = found(n)
        return max(probe.cost, cost(probe.rows, SIMPLEST, SIMPLEST)) <= SHARE

    if wanted is not None:
        return found(None if wanted == "all" else int(wanted))
    low, high = 1, max(map(len, sets.values()))  # the cost rises with the rows, but for lengths
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return found(low)


def _reads(parts: Sequence[Objective]) -> dict[str, tuple[Role, ...]]:
    """The data sets that parts read, and which sequences of their samples."""
    roles: dict[str, set[Role]] = {}
    for part in parts:
        roles.setdefault(part.on, set()).update(part.roles)
    return {name: tuple(sorted(each)) for name, each in roles.items()}


def _tokens(samples: SampleSet, roles: tuple[Role, ...]) -> np.ndarray:
    """Tokens of each sample in sequences of these roles."""
    return np.array(
        [sum(len(q) for role in roles for q in s.sequences()[role]) for s in samples.samples]
    )

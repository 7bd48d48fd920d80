"""The rows that a probe measures: as many as keep a probe within the cost of a training step."""

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
"""Part of a training step that a probe may cost by the count. Copies of the weights and the writing
of the result, which are not counted, take the rest (benchmarks/bench_probe.py)."""

WEIGHT_PASS = 300
"""Forward passes over one token that take as long as the work on whole parameters for one gradient:
forming it, products and copies. Measured (benchmarks/bench_probe.py)."""

SIMPLEST = (GA(),)
"""The objectives with which a training step is cheapest."""


@dataclass(frozen=True)
class ProbeRows:
    """The rows of every data set that probes measure, and the cost of a probe.

    Attributes:
        rows: row numbers by data set, ascending, evenly spread.
        cost: cost of a probe in training steps, by the count of forward passes of docs/concepts.md.
    """

    rows: Mapping[str, Sequence[int]]
    cost: float

    def sentence(self, sets: Mapping[str, SampleSet]) -> str:
        """A sentence for people that tells the rows and the cost of a probe."""
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

    Work is counted in tokens times forward passes, for K parts of objectives and M risks:

    - A training step takes 3 passes over its tokens (forward, and backward with weight gradients).
    - A probe takes 3 passes over each risk's rows for the risks' gradients.
    - Over the rows that objectives read, the reverse engine takes `1 + M + K` passes, with norms
      `1 + M + 2 K`. The forward engine takes `1 + 2 M`, and about `6 + 4.5 M` by groups of layers.
    - Effects in the optimizer's metric need whole gradients. Where the engine forms none, these
      take `1 + 2 K` more passes over the same rows.
    - By sample, intervals need 1 more pass over the rows of every risk but the forget risk
      (`geffect_fast.results.risk_rows`).
    - Work that does not depend on the rows is `WEIGHT_PASS` times `1 + M + K`.

    Args:
        sets: the whole data sets by name: forget, retain, and probes.
        wanted: rows of each set, or `all`. None: as many as make a probe cost at most one training
            step (`SHARE` of a step by this count), and at least one; never more than with `ga` in
            place of all objectives, so that runs of several objectives measure the same rows and
            can be compared.
        trained: parts of the objective that is trained on.
        measured: parts of all objectives that are measured.
        settings: settings of the probe.
        rows_an_update: rows that an update of the training reads, by data set.
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
    low, high = 1, max(map(len, sets.values()))  # cost rises with rows, but for their lengths
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return found(low)


def _reads(parts: Sequence[Objective]) -> dict[str, tuple[Role, ...]]:
    """The data sets that parts read, with the roles of the sequences that they read there."""
    roles: dict[str, set[Role]] = {}
    for part in parts:
        roles.setdefault(part.on, set()).update(part.roles)
    return {name: tuple(sorted(each)) for name, each in roles.items()}


def _tokens(samples: SampleSet, roles: tuple[Role, ...]) -> np.ndarray:
    """Number of tokens of each sample in its sequences of the given roles."""
    return np.array(
        [sum(len(q) for role in roles for q in s.sequences()[role]) for s in samples.samples]
    )

"""Page sections on one model: verdicts, layers, instances, tokens, cosines, the full table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from geffect_fast.report.figures.profile import is_wanted, scatter_instances
from geffect_fast.report.figures.style import LINE_UNWANTED, LINE_WANTED, blank_figure, legend_below
from geffect_fast.report.figures.sweep import pareto_figure, sweep_figure
from geffect_fast.report.format import (
    Interval,
    Number,
    notes,
    number,
    number_with_interval,
    question,
    risk_words,
    title_of,
)
from geffect_fast.report.html.blocks import (
    MOST_ROWS,
    Block,
    HeatMap,
    Table,
    Text,
    Tokens,
    drawn_blocks,
    figure_block,
    left_out,
    notes_of,
)
from geffect_fast.report.summary.conflicts import CAPTION, NOTE, Conflicts
from geffect_fast.report.summary.effects import (
    by_place,
    by_sample,
    labels,
    named_once,
    place_half_widths,
    shares,
    thinned,
)
from geffect_fast.report.summary.findings import findings
from geffect_fast.report.summary.objectives import HARDLY, summarise
from geffect_fast.report.summary.place_conflicts import (
    BY_POSITION,
    BY_TOKEN,
    PLACES_NOTE,
    PlaceConflicts,
)
from geffect_fast.report.summary.sweep import NUMBERS, Swept, highlights, is_sweep
from geffect_fast.report.tokens.html import token_values
from geffect_fast.report.tokens.view import has_tokens, token_view
from geffect_fast.results.risks import UNLEARN, effect_name, symbol

if TYPE_CHECKING:
    import xarray as xr

MOST_PANELS = 12
"""The most objectives whose instances are drawn."""
MOST_POINTS = 250
"""The most instances in a panel: the largest, and an even choice of the others."""
NAMED = 3
"""The most instances that are named for removal, and the most that are named for harm."""
QUESTION = 140
"""The most characters of a question. A longer question is shortened."""
TOKEN_SAMPLES, TOKEN_VALUES = 8, 40_000
"""The most answers of the token view, and the most numbers: about a quarter of `MAX_VALUES`, the
limit of the page of tokens."""


def sections(dataset: xr.Dataset, summed: xr.Dataset) -> dict[str, list[Block]]:
    """The sections of a page on a profile or a sweep, by id.

    Args:
        dataset: the result.
        summed: the result without positions or tokens.
    """
    return {
        "answer": answer(summed),
        "verdicts": verdicts(summed),
        "curves": sweep_curves(summed),
        "layers": layers(summed),
        "instances": instances(summed),
        "tokens": tokens(dataset),
        "cosines": cosines(summed),
        "conflicts": [*conflicts(summed), *place_conflicts(dataset)],
        "table": full_table(summed),
    }


def answer(dataset: xr.Dataset) -> list[Block]:
    """Sentences on the objectives that forget, their cost, its source, and what to trust."""
    what, where = findings(dataset)
    trust = (
        "Effects are first order: one small step from this very model. How far that holds is "
        "measured over steps, by geffect-fast unlearn, or by profile --checkpoints for a run that "
        "there is."
    )
    return [Text(what, "lead"), Text(where), Text(trust)]


def sweep_curves(dataset: xr.Dataset) -> list[Block]:
    """Blocks of a sweep's figures; a profile has none."""
    if not is_sweep(dataset):
        return []
    figures = {"sweep": sweep_figure(dataset), "pareto": pareto_figure(dataset, (6.2, 5.2))}
    return drawn_blocks(figures, [*figures])


def verdicts(dataset: xr.Dataset) -> list[Block]:
    """A table with a row an objective: verdict in words, collateral, and effect on every risk.

    A sweep has two tables in its place: the best of each family, and the Pareto front.
    """
    if is_sweep(dataset):
        return _swept_verdicts(dataset)
    rows = summarise(dataset)
    table = Table(
        f"{len(rows)} objectives on {dataset.attrs['n_forget']} forget rows",
        ["objective", "verdict", "collateral", *map(effect_name, rows[0].effects)],
        [[row.objective, row.verdict, *effect_cells(row.numbers)] for row in rows[:MOST_ROWS]],
        frozenset([0, 1]),
    )
    return [table, *left_out(len(rows), "objectives"), *_notes(dataset)]


def effect_cells(numbers: Mapping[str, Number]) -> list[str]:
    """Cells of an objective: collateral, which alone compares between objectives, then effects."""
    effects = [of for name, of in numbers.items() if name != "collateral"]
    collateral = number_with_interval(*numbers["collateral"], ".2g")
    return [collateral, *(number_with_interval(*each, "+.3g") for each in effects)]


_NOTE = (
    "Collateral: how much the worst other risk rises for a unit rise of the forget risk; below 0 "
    "it falls. A dash: not defined. Effects compare between objectives only where they are of one "
    "kind (npo and dpo sum over whole answers, most others are means over tokens); collateral "
    "always compares."
)


def _swept_verdicts(dataset: xr.Dataset) -> list[Block]:
    swept = Swept.of(dataset)

    def cells(i: int) -> list[str]:
        return effect_cells(swept.numbers(i))

    found = []
    for family in swept.families:
        picks = swept.picks(family)
        if not family.axes:
            found.append((family.text, "the only one", "", cells(family.at[0])))
        elif not picks:
            found.append((family.text, "undefined (NaN)", "", ["–"] * len(NUMBERS)))
        else:
            found += [
                (family.text, ", ".join(names), family.point(i), cells(family.at[i]))
                for i, names in picks.items()
            ]
    rows = [[text, best, at, *numbers] for text, best, at, numbers in found]
    front = swept.ranked_front()
    shown = thinned(front, MOST_ROWS // 8)
    return [
        Table(
            f"The best of each family, of {len(swept.objectives)} objectives",
            ["family", "best in", "at", "collateral", "e_u", "e_r"],
            rows[:MOST_ROWS],
            frozenset([0, 1, 2]),
        ),
        *left_out(len(rows), "rows"),
        Table(
            f"Pareto front: {len(front)} objectives that none beats in both removal and harm",
            ["objective", "collateral", "e_u", "e_r"],
            [[swept.label(int(i)), *cells(i)] for i in shown],
        ),
        *left_out(len(front), "objectives of the front", len(shown)),
        *_notes(dataset),
    ]


def _notes(dataset: xr.Dataset) -> list[Block]:
    """Notes on how to read the numbers, what they compare with, and how far to trust them."""
    return notes_of([_NOTE, *notes(dataset.attrs)])


def layers(dataset: xr.Dataset) -> list[Block]:
    """A heat map a risk, objectives by parts of the model. Its cells can be read without colour."""
    placed = by_place(dataset, blocks=True)
    if placed is None:
        return []
    parts, values = placed
    half_widths = place_half_widths(dataset, blocks=True)
    objectives = labels(dataset, "objective")
    if is_sweep(dataset):
        chosen = highlights(dataset)["objective"].values
        kept = np.array([i for i, o in enumerate(objectives) if o in chosen])
    else:
        kept = thinned(np.arange(len(objectives)), MOST_ROWS // 4)
    blocks: list[Block] = [
        HeatMap.of(
            f"{effect_name(risk)}: effect on the {risk_words(risk)} by part of the model, input to "
            "output (numbers: blocks)",
            risk,
            parts,
            [objectives[k] for k in kept],
            values[kept, m],
            None if half_widths is None else half_widths[kept, m],
        )
        for m, risk in enumerate(labels(dataset, "risk"))
    ]
    note = (
        "Each row by itself: 9 is its largest effect, which stands beside its name. Blue is wanted "
        "(the forget risk rises, any other does not); orange and a ! are unwanted."
    )
    if half_widths is not None:
        note += (
            " In brackets, without colour: the interval by the choice of the objectives' rows "
            "holds 0. The rows of other risks are not told apart by part."
        )
    return [*blocks, *left_out(len(objectives), "objectives", len(kept)), *notes_of([note])]


def instances(dataset: xr.Dataset) -> list[Block]:
    """A scatter of the forget rows for each objective, with the rows that remove or cost most."""
    n = dataset.sizes["objective"]
    if is_sweep(dataset):
        dataset = highlights(dataset)
    effect = by_sample(dataset)
    if effect is None:
        return []
    each = {str(one["objective"].values): one for one in effect}
    return scatters(each, n, "objectives")


def scatters(effects: Mapping[str, xr.DataArray], n: int, what: str) -> list[Block]:
    """A figure with a scatter of rows for each of several objectives or runs.

    Args:
        effects: effects `(risk, sample)` of each, by the panel's title.
        n: number of all objectives or runs, also those that `effects` leaves out.
        what: `objectives` or `runs`, for the note on how many are shown.
    """
    once = named_once({name: of for name, of in effects.items() if of.sizes["sample"]})
    names = [*once]
    kept = [names[k] for k in thinned(np.arange(len(names)), MOST_PANELS)]
    if not kept:
        return []
    figure = blank_figure(4.4 * len(kept), 3.5)
    panels = figure.subplots(1, len(kept), squeeze=False)[0]
    lists = []
    for panel, name in zip(panels, kept, strict=True):
        e_u, e_r = (once[name].sel(risk=risk).values for risk in (UNLEARN, "retain"))
        drawn = _drawn(e_u, e_r)
        scatter_instances(panel, e_u[drawn], e_r[drawn])
        panel.set_title(title_of(name), fontsize=10, loc="left")
        panel.set_xlabel("e_u of a forget row (left: removes)", fontsize=9)
        panel.set_ylabel("e_r of the row (down: harms the rest)", fontsize=9)
        named, wanted = outliers(e_u, e_r), is_wanted(e_u, e_r)
        for place, i in enumerate(named, 1):
            colour = LINE_WANTED if wanted[i] else LINE_UNWANTED
            dot = {"boxstyle": "circle,pad=0.2", "edgecolor": colour, "facecolor": "white"}
            look = {"ha": "center", "va": "center", "fontsize": 8, "bbox": dot}
            panel.text(e_u[i], e_r[i], str(place), **look)
        lists.append([_named(once[name], i, e_u, e_r) for i in named])
    legend_below(figure, panels[0])
    rows = max(once[name].sizes["sample"] for name in kept)
    caption = (
        f"Each point is one of {rows} forget rows; numbered are up to {NAMED} that remove most and "
        f"up to {NAMED} that cost the rest most."
    )
    if rows > MOST_POINTS:
        caption += f" {MOST_POINTS} of {rows} are drawn: the largest, and some of the rest."
    return [
        figure_block(figure, "instances", caption, lists),
        *left_out(n - len(effects) + len(once), what, len(kept)),
    ]


def outliers(e_u: np.ndarray, e_r: np.ndarray) -> list[int]:
    """Indices of the rows that remove most, then of those that cost most, each once."""
    both = np.isfinite(e_u) & np.isfinite(e_r)
    found: dict[int, None] = {}
    for values in (e_u, e_r):
        order = np.argsort(np.where(both, values, np.inf), kind="stable")[:NAMED]
        found |= {int(i): None for i in order if both[i] and values[i] < 0}
    return list(found)


def _drawn(e_u: np.ndarray, e_r: np.ndarray) -> np.ndarray:
    """Indices of the rows to draw. Of many, half are the largest, half evenly chosen others."""
    if len(e_u) <= MOST_POINTS:
        return np.arange(len(e_u))
    sizes = [np.abs(np.where(np.isfinite(v), v, 0.0)) for v in (e_u, e_r)]
    reach = np.maximum(*(size / (size.max() or 1.0) for size in sizes))
    order = np.argsort(-reach, kind="stable")
    half = MOST_POINTS // 2
    return np.concatenate([order[:half], thinned(order[half:], MOST_POINTS - half)])


def _named(effect: xr.DataArray, i: int, e_u: np.ndarray, e_r: np.ndarray) -> str:
    row = effect["sample"].values[i]
    asked = question(effect, i, QUESTION)
    quoted = f"“{asked}” " if asked else ""
    effects = (number(float(e[i]), "+.2g") for e in (e_u, e_r))
    return "{}(row {}: e_u {}, e_r {})".format(quoted, row, *effects)


def tokens(dataset: xr.Dataset) -> list[Block]:
    """The token view of the first answers; none where the result does not tell tokens apart."""
    if not has_tokens(dataset):
        return []
    if is_sweep(dataset):
        dataset = highlights(dataset)
    view = token_view(dataset, samples=TOKEN_SAMPLES, all_objectives=True, max_values=TOKEN_VALUES)
    return [Tokens(token_values(view, level=3))] if view.answers else []


def cosines(dataset: xr.Dataset) -> list[Block]:
    """A table of the cosines of objectives' gradients with the risks': direction, no size."""
    if "cosine" not in dataset:
        return []
    rows = summarise(dataset)
    risks = list(rows[0].cosines)
    kept = thinned(np.arange(len(rows)), MOST_ROWS)
    table = Table(
        "Cosine of an objective's gradient with a risk's: direction without size",
        ["objective", "reading", *(f"cos_{symbol(risk)}" for risk in risks)],
        [
            [
                rows[k].objective,
                read_cosines(rows[k].cosines, rows[k].cosine_intervals),
                *(
                    number_with_interval(c, rows[k].cosine_intervals.get(risk), "+.3f")
                    for risk, c in rows[k].cosines.items()
                ),
            ]
            for k in kept
        ],
        frozenset([0, 1]),
    )
    return [table, *left_out(len(rows), "objectives", len(kept))]


def conflicts(dataset: xr.Dataset) -> list[Block]:
    """A table of each gradient's part that opposes the retain risk's; none if not measured."""
    found = Conflicts.of(dataset)
    if found is None:
        return []
    rows = found.rows()
    kept = [*thinned(np.arange(len(rows) - 1), MOST_ROWS), len(rows) - 1]
    names = [*rows]
    table = Table(
        CAPTION,
        ["objective", *(part.replace("_", " ") for part in found.parts)],
        [[names[k], *(number(share, ".0f") for share in rows[names[k]])] for k in kept],
    )
    left = left_out(len(rows) - 1, "objectives", len(kept) - 1)
    return [table, *left, *notes_of([NOTE])]


def place_conflicts(dataset: xr.Dataset) -> list[Block]:
    """Tables of conflicts with the retain risk by position, and of the tokens behind them.

    There are none where the result does not tell places apart.
    """
    found = PlaceConflicts.of(dataset)
    if found is None:
        return []
    names = [*found.opposed]
    kept = thinned(np.arange(len(names)), MOST_ROWS)
    by_position = Table(
        BY_POSITION,
        ["objective", *found.spans],
        [[names[k], *(number(s, ".0f") for s in found.opposed[names[k]])] for k in kept],
    )
    blocks: list[Block] = [by_position, *left_out(len(names), "objectives", len(kept))]
    if found.rows:
        shown = thinned(np.arange(len(found.rows)), MOST_ROWS)
        rows = [[*found.rows[i]] for i in shown]
        by_token = Table(BY_TOKEN, ["objective", "row", "tokens"], rows, frozenset([0, 2]))
        blocks += [by_token, *left_out(len(found.rows), "rows", len(shown))]
    return [*blocks, *notes_of([PLACES_NOTE])]


_ON_FORGET = {
    -1: "removes",
    0: "hardly touches it",
    1: "reinforces",
    None: "removes or not: within noise",
}
_ON_REST = {
    -1: "costs the rest",
    0: "leaves the rest",
    1: "helps the rest",
    None: "harms the rest or not: within noise",
}


def read_cosines(by_risk: Mapping[str, float], intervals: Mapping[str, Interval]) -> str:
    """A reading of cosines in words, as far as the whole of their intervals agrees with it.

    Args:
        by_risk: the cosine with each risk's gradient.
        intervals: the interval of each cosine; empty or NaN where it is not known.
    """
    if not all(map(np.isfinite, by_risk.values())):
        return "not defined"
    known = {
        risk: [c, *(bound for bound in intervals.get(risk, ()) if not np.isnan(bound))]
        for risk, c in by_risk.items()
    }
    others = [known[risk] for risk in by_risk if risk != UNLEARN]
    worst = [min(map(min, others), default=0.0), min(map(max, others), default=0.0)]
    return f"{_ON_FORGET[_sign(known[UNLEARN])]}, {_ON_REST[_sign(worst)]}"


def _sign(values: Sequence[float]) -> int | None:
    """Sign of cosines: -1 or 1 beyond `HARDLY`, 0 within; None where they differ in it."""
    signs = {-1 if c < -HARDLY else 1 if c > HARDLY else 0 for c in values}
    return signs.pop() if len(signs) == 1 else None


def full_table(dataset: xr.Dataset) -> list[Block]:
    """Tables of every number of every objective, and of shares by part of the model."""
    rows = summarise(dataset)
    kept = [int(k) for k in thinned(np.arange(len(rows)), MOST_ROWS)]
    risks, with_cosines = list(rows[0].effects), bool(rows[0].cosines)
    norms = dataset["grad_norm"].values if "grad_norm" in dataset else None
    head = ["objective", "verdict", "loss", *map(effect_name, risks)]
    head += [f"cos_{symbol(risk)}" for risk in risks if with_cosines]
    head += ["|grad|"] * (norms is not None) + ["collateral"]
    cells = []
    for k in kept:
        row = rows[k]
        found = [row.objective, row.verdict, number(row.loss, ".4g")]
        found += [
            number_with_interval(e, row.intervals.get(r), "+.4g") for r, e in row.effects.items()
        ]
        found += [number(c, "+.3f") for c in row.cosines.values()]
        found += [] if norms is None else [number(float(norms[k]), ".4g")]
        collateral = number_with_interval(row.collateral, row.collateral_interval, ".3f")
        cells.append([*found, collateral])
    blocks: list[Block] = [
        Table("All objectives", head, cells, frozenset([0, 1])),
        *left_out(len(rows), "objectives", len(kept)),
    ]
    return [*blocks, *part_tables(dataset, kept)]


def part_tables(dataset: xr.Dataset, kept: Sequence[int]) -> list[Block]:
    """Tables of the signed shares of parts of the model, one a risk."""
    placed = by_place(dataset, blocks=False)
    if placed is None:
        return []
    parts, values = placed
    objectives = labels(dataset, "objective")
    return [
        Table(
            f"Where {effect_name(risk)} comes from: percent of each part, sizes adding to 100",
            ["objective", *(part.replace("_", " ") for part in parts)],
            [
                [objectives[k], *(number(100 * share, "+.0f") for share in shares(values[k, m]))]
                for k in kept
            ],
        )
        for m, risk in enumerate(labels(dataset, "risk"))
    ]

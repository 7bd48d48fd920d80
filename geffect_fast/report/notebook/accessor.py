"""`result.gf`: a result shows itself.

Importing this module registers the accessor with xarray. `geffect_fast` imports the module as soon
as a function that gives results is accessed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import xarray as xr

from geffect_fast.errors import InputError

if TYPE_CHECKING:
    from geffect_fast.report.figures.canvas import PlainFigure
    from geffect_fast.report.figures.style import Drawings
    from geffect_fast.report.notebook.displays import ShownPage, ShownTokens

_TOLD_APART = {"layers": ("parts of the model", "parameter"), "instances": ("rows", "sample")}
"""By figure: the things that it tells apart, and the axis of the result that it needs for them."""


@xr.register_dataset_accessor("gf")
class ResultAccessor:
    """The summary, figures, tokens and page of a result, as `result.gf`.

    `result.gf` itself shows the summary: in a notebook the head of the page, in a terminal the
    output of `geffect-fast show`.

    Raises:
        InputError: the data set is not a result, or a result that was taken apart.

    Examples:
        >>> result.gf
        >>> result.gf.plot.layers().savefig("layers.png")
        >>> result.gf.tokens(by="damage")
        >>> result.gf.report("page.html")
    """

    def __init__(self, dataset: xr.Dataset) -> None:
        from geffect_fast.results.form import check_whole

        check_whole(dataset, "result.gf: this")
        self._dataset = dataset

    def __repr__(self) -> str:
        from rich.console import Group

        from geffect_fast.report.tables.result import tables_and_sentences
        from geffect_fast.terminal import columns, plain_text

        tables, sentences = tables_and_sentences(self._dataset)
        return plain_text(Group(tables, *sentences), columns())

    def _repr_html_(self) -> str:
        from geffect_fast.report.html.page import top_blocks
        from geffect_fast.report.html.templates import render

        return render("notebook.html.jinja", blocks=top_blocks(self._dataset))

    @cached_property
    def plot(self) -> Plots:
        """The figures of the result, a method each."""
        return Plots(self._dataset)

    def tokens(
        self,
        objective: str | None = None,
        *,
        samples: int | None = None,
        by: str | None = None,
        rows: Sequence[int | str] | None = None,
    ) -> ShownTokens:
        """Answers whose tokens are coloured by e_u, what is attacked, and by e_r, what costs.

        Args:
            objective: label of the objective; None: the first.
            samples: how many forget rows; None: 5.
            by: which forget rows: the `first`, those of strongest `removal` (lowest e_u) or those
                of most `damage` (lowest e_r); None: first.
            rows: in place of both, row numbers of the forget set, or `retain:3` for the retain
                set's.

        Returns:
            The tokens, which a notebook shows in colour and a terminal as text. A result with
            steps gives the tokens of its last step.

        Raises:
            InputError: the result has no token axis, there is no such objective, order or row, or
                the choices contradict each other.
        """
        from geffect_fast.report.notebook.displays import ShownTokens
        from geffect_fast.report.summary.effects import is_comparison, last_step
        from geffect_fast.report.summary.measures import is_evaluation
        from geffect_fast.report.tokens.view import token_view

        if is_evaluation(self._dataset) or is_comparison(self._dataset):
            raise InputError(
                "result.gf.tokens: measures and comparisons have no tokens; take a result of "
                "gf.profile"
            )
        last = last_step(self._dataset)
        return ShownTokens(token_view(last, objective, samples=samples, by=by, rows=rows))

    def report(self, file: str | Path | None = None) -> ShownPage:
        """The whole page, as `geffect_fast.write_page` writes it.

        Args:
            file: a file to write the page into as well; an existing one is replaced.

        Returns:
            The page, which a notebook shows in a frame that scrolls.

        Raises:
            InputError: the result is a comparison, or the disk refuses.
        """
        from geffect_fast.report.html.page import page_html, write_html
        from geffect_fast.report.notebook.displays import ShownPage

        html = page_html(self._dataset)
        return ShownPage(html, None if file is None else write_html(html, file))


class Plots:
    """The figures of a result, `result.gf.plot`: each method returns a matplotlib figure.

    Besides `layers` and `instances` there is a method for each figure in a run's `plots/`, of the
    same name: `sweep` and `pareto` of a sweep, `effects`, `risks`, `prediction` and others over
    steps, `measures` of an evaluation. `dir` lists the methods. The figures belong to no window: a
    notebook shows them, `savefig` writes them.
    """

    def __init__(self, dataset: xr.Dataset) -> None:
        self._dataset = dataset

    def layers(self) -> PlainFigure:
        """Figure of effects by part of the model, a row an objective and a panel a risk.

        Raises:
            InputError: the result sums over parts of the model.
        """
        return self._figure("layers")

    def instances(self) -> PlainFigure:
        """Figure of the effects of every forget row, e_u against e_r, a panel an objective.

        Raises:
            InputError: the result sums over rows, or has several steps.
        """
        return self._figure("instances")

    def __repr__(self) -> str:
        return f"<figures: {', '.join(f'{name}()' for name in self._drawings)}>"

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._drawings})

    def __getattr__(self, name: str) -> Callable[[], PlainFigure]:
        if name.startswith("_") or name not in self._drawings:
            raise AttributeError(
                f"result.gf.plot has no figure '{name}'; it has {', '.join(self._drawings)}"
            )
        return partial(self._figure, name)

    @cached_property
    def _drawings(self) -> Drawings:
        from geffect_fast.report.figures.result import result_drawings
        from geffect_fast.report.summary.measures import is_evaluation
        from geffect_fast.results.by_rows import sum_positions

        held = self._dataset
        return result_drawings(held, held if is_evaluation(held) else sum_positions(held))

    def _figure(self, name: str) -> PlainFigure:
        what = f"result.gf.plot.{name}"
        if name not in self._drawings:
            raise InputError(
                f"{what}: this result has {', '.join(self._drawings)}; a result of gf.profile, or "
                "one step of several, has layers, instances"
            )
        figure = self._drawings[name]()
        if figure is None and name in _TOLD_APART:
            shown, axis = _TOLD_APART[name]
            raise InputError(
                f"{what}: the result does not tell {shown} apart; profile with "
                f"resolve=['{axis}', ...]"
            )
        if figure is None:
            raise InputError(f"{what}: the result holds nothing for it")
        return figure

"""Files of a report, each of which may fail alone: the others are written all the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from geffect_fast.errors import UnfinishedError, reason_of
from geffect_fast.storage.disk import remove
from geffect_fast.storage.run_folder import PLOTS

if TYPE_CHECKING:
    from geffect_fast.report.figures.canvas import PlainFigure
    from geffect_fast.report.figures.style import Drawings


class ReportFiles(NamedTuple):
    """Files of a report that are written together.

    Attributes:
        names: by path in the run's folder; where the result holds nothing for them none is written.
        write: writes them into a folder.
    """

    names: tuple[str, ...]
    write: Callable[[Path], object]


def write_each(files: Iterable[ReportFiles], folder: Path) -> None:
    """Write all that can be written.

    Args:
        files: in order.
        folder: exists.

    Raises:
        UnfinishedError: some could not be, for whatever reason; the line names the first.
    """
    lost: list[tuple[str, Exception]] = []
    for names, write in files:
        try:
            (folder / names[0]).parent.mkdir(exist_ok=True)
            write(folder)
        except Exception as error:  # of fonts, disks, templates, packages that are not there
            for name in names:
                remove(folder / name)
            lost.append((names[0], error))
    if lost:
        (name, first), more = lost[0], len(lost) - 1
        others = f", nor {more} more" if more else ""
        raise UnfinishedError(f"{name} could not be made ({reason_of(first)}){others}") from first


def plot_files(
    drawings: Drawings, kinds: tuple[str, ...] = ("png", "svg")
) -> Iterator[ReportFiles]:
    """The files of every figure in `plots/`."""
    for name, draw in drawings.items():

        def write(
            folder: Path, name: str = name, draw: Callable[[], PlainFigure | None] = draw
        ) -> None:
            from geffect_fast.report.figures.style import save_figure

            figure = draw()
            if figure is not None:
                save_figure(figure, folder / PLOTS / name, kinds)

        yield ReportFiles(tuple(f"{PLOTS}/{name}.{kind}" for kind in kinds), write)

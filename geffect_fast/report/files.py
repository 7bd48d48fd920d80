"""Files of a report, written one after the other. A file that fails does not stop the others."""

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
        names: paths within the run's folder. None is written where the result holds nothing for
            them.
        write: writes the files into a folder.
    """

    names: tuple[str, ...]
    write: Callable[[Path], object]


def write_each(files: Iterable[ReportFiles], folder: Path) -> None:
    """Write every file that can be written.

    Args:
        files: the files, in order.
        folder: an existing folder.

    Raises:
        UnfinishedError: some files could not be written, for whatever reason. The message names
            the first.
    """
    lost: list[tuple[str, Exception]] = []
    for names, write in files:
        try:
            (folder / names[0]).parent.mkdir(exist_ok=True)
            write(folder)
        except Exception as error:  # fonts, disks, templates, missing packages
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
    """The files in `plots/` of every figure."""
    for name, draw in drawings.items():

        def write(
            folder: Path, name: str = name, draw: Callable[[], PlainFigure | None] = draw
        ) -> None:
            from geffect_fast.report.figures.style import save_figure

            figure = draw()
            if figure is not None:
                save_figure(figure, folder / PLOTS / name, kinds)

        yield ReportFiles(tuple(f"{PLOTS}/{name}.{kind}" for kind in kinds), write)

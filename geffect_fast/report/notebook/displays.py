"""Objects that `result.gf` returns for display: answers by token, and the whole page."""

from __future__ import annotations

from pathlib import Path

from markupsafe import escape

from geffect_fast.report.html.blocks import Tokens
from geffect_fast.report.html.templates import render
from geffect_fast.report.tokens.html import token_values
from geffect_fast.report.tokens.terminal import tokens_text
from geffect_fast.report.tokens.view import TokenView
from geffect_fast.terminal import columns

HEIGHT = "42rem"
"""Height of the frame in which a notebook shows a page. A longer page scrolls."""


class ShownTokens:
    """Answers by token: on a background of colour, in a terminal with levels beneath the tokens.

    Attributes:
        view: the effects of the tokens.
    """

    def __init__(self, view: TokenView) -> None:
        self.view = view

    def __repr__(self) -> str:
        return tokens_text(self.view, columns())

    def _repr_html_(self) -> str:
        values = token_values(self.view, level=3, script=False)
        return render("notebook.html.jinja", blocks=[Tokens(values)])


class ShownPage:
    """A whole page, which a notebook shows in a frame of its own.

    Attributes:
        html: text of the page.
        file: the file that the page was written into; None: none.
    """

    def __init__(self, html: str, file: Path | None) -> None:
        self.html, self.file = html, file

    def __repr__(self) -> str:
        size = f"page of {len(self.html.encode()) / 2**10:.0f} KiB"
        if self.file is None:
            return f"<{size}; .report('page.html') writes it into a file>"
        return f"<{size} in {str(self.file)!r}>"

    def _repr_html_(self) -> str:
        # The frame keeps the page and its styles apart from the notebook.
        return (
            f'<iframe srcdoc="{escape(self.html)}" sandbox="allow-scripts" '
            f'title="geffect_fast: the whole page" style="width: 100%; height: {HEIGHT}; '
            'border: 1px solid #8888; border-radius: 6px"></iframe>'
        )

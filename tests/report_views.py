"""Readers of reports, for tests: printed text, lines of figures, whole pages, colours."""

from __future__ import annotations

import io
import itertools
import re

import numpy as np
from html_tree import Page, assert_allows_no_request, elements, find, text
from rich.console import Console

ORDER = [
    *("answer", "signs", "verdicts", "curves", "layers", "instances", "tokens", "cosines"),
    *("prediction", "table", "made"),
]
"""Sections of a page, in their order."""


def text_of(what, width=120):
    """The text that `rich` prints of one or several tables."""
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(what)
    return console.export_text()


def words_of(what, width=200):
    """The same text on one line."""
    return " ".join(text_of(what, width).split())


def drawn(panel):
    """Lines of a panel by their names."""
    return {
        line.get_label(): line.get_ydata()
        for line in panel.get_lines()
        if not line.get_label().startswith("_")
    }


def luminance(colour):
    """Relative luminance of `#rrggbb`, as WCAG defines it."""
    c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def checked(html):
    """The tree of a page, checked to be complete and to need no other file."""
    root = Page(html).root
    ids = [e[1]["id"] for e in elements(root) if "id" in e[1]]
    assert len(ids) == len(set(ids))
    for element in elements(root):
        for name, value in element[1].items():
            assert not name.startswith("on")
            if name in ("href", "src", "action", "data", "poster", "srcset"):
                assert value.startswith("#") or (element[0] == "image" and "data:" in value[:5])
                assert value[0] != "#" or value[1:] in ids
            for target in re.findall(r"url\(#([^)]+)\)", value):
                assert target in ids
            assert "url(" not in value or "url(#" in value
    assert html.count("http") == html.count("<meta http-equiv=") == 1
    assert_allows_no_request(root)
    assert "@import" not in html and "url(" not in style_of(root)
    for svg in find(root, "svg"):
        assert svg[1].get("aria-hidden") == "true" or (
            svg[1]["role"] == "img" and svg[1]["aria-label"].strip(" ,")
        )
    for figure in find(root, "figure"):
        assert len(text(find(figure, "figcaption")[0])) > 20
    for table in find(root, "table"):
        assert table[1].get("aria-label") or "map" in str(find(root, "div", **{"class": "map"}))
        heads = find(find(table, "thead")[0], "th")
        assert heads and all(head[1]["scope"] == "col" for head in heads)
        rows = find(find(table, "tbody")[0], "tr")
        for row in rows:
            assert row[2][0][0] == "th" and row[2][0][1]["scope"] == "row"
            assert len([c for c in row[2] if not isinstance(c, str)]) >= len(heads)
    levels = [int(e[0][1]) for e in elements(root) if re.fullmatch(r"h[1-6]", e[0])]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    (html_element,), (title,) = find(root, "html"), find(root, "title")
    assert html_element[1]["lang"] == "en" and text(title)
    assert [len(find(root, tag)) for tag in ("header", "main", "nav", "footer")] == [1] * 4
    assert not re.search(r"\bnan\b|None(?! of)|Undefined", visible(root))
    return root


def style_of(root):
    """The text of all style sheets of a page."""
    return "".join(map(text, find(root, "style")))


def visible(root):
    """The text of a page that a reader sees, without figures."""
    hidden = ("style", "script", "svg")
    if isinstance(root, str):
        return root
    return "" if root[0] in hidden else " ".join(visible(c) for c in root[2])


def sections(root):
    """Ids of the sections of a page."""
    return [e[1]["id"] for e in find(root, "section") if e[1].get("class") == "part"]


def section(root, name):
    """The section of a page with this id."""
    return find(root, "section", id=name)[0]


def rows_of(root, label):
    """The cells of the table whose name begins like this."""
    table = next(t for t in find(root, "table") if t[1].get("aria-label", "").startswith(label))
    return [
        [text(cell) for cell in row[2] if not isinstance(cell, str)] for row in find(table, "tr")
    ]

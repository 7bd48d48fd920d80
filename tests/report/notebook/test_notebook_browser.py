"""A notebook's outputs in Chromium: readable beside any surroundings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chromium import NAMES, installed
from matplotlib.image import imread
from synthetic import OBJECTIVES, make_dataset

from geffect_fast.report.notebook.accessor import ResultAccessor

pytestmark = pytest.mark.skipif(
    installed() is None, reason=f"there is no browser: none of {', '.join(NAMES)}"
)
SCRIPT = Path(__file__).parents[1].joinpath("html/page_check.js").read_text(encoding="utf-8")
DARK = "background: #111; color: #eee"
AROUND = {
    "light": ("", "", ""),
    "JupyterLab, dark": (
        "",
        'data-jp-theme-light="false"',
        f"{DARK}; --jp-layout-color0: #111; --jp-content-font-color1: #eee",
    ),
    "VS Code, dark": (
        "",
        'class="vscode-dark"',
        f"{DARK}; --vscode-editor-background: #111; --vscode-editor-foreground: #eee",
    ),
    "Colab, dark": ('theme="dark"', "", DARK),
}
"""Attributes of the page and of its body, and the body's style."""
OTHERS = "<h3>Heading</h3><table><tr><th>a</th><td class='words box w9'>b</td></tr></table>"
STYLES = (
    "JSON.stringify([...document.querySelectorAll('.others *')].map((e) => {"
    " const s = getComputedStyle(e); return [s.color, s.backgroundColor, s.font, s.margin]; }))"
)


@pytest.fixture(scope="module")
def shown():
    """A summary, a figure, tokens with their maps open, and a page in its frame."""
    result = make_dataset(
        (OBJECTIVES[0], "long(" + "x" * 90 + ")"),
        n_blocks=3,
        n_forget=3,
        resolve=("group", "sample", "token"),
    )
    shows = ResultAccessor(result)
    tokens = shows.tokens(samples=2)._repr_html_().replace("<details", "<details open")
    figure = shows.plot.layers()._repr_html_()
    return shows._repr_html_() + figure + tokens + shows.report()._repr_html_()


@pytest.mark.parametrize("name", AROUND)
def test_it_is_readable_and_leaves_the_rest_as_it_is(browser, shown, tmp_path, name):
    of_page, of_body, style = AROUND[name]
    styles = []
    for file, output in ((tmp_path / "without.html", ""), (tmp_path / "with.html", shown)):
        file.write_text(
            f"<!doctype html><html {of_page}><meta charset=utf-8>"
            '<meta name="viewport" content="width=device-width">'
            f'<body {of_body} style="{style}"><div class="others">{OTHERS}</div>{output}',
            encoding="utf-8",
        )
        for width in (390, 1280):
            browser.look(width)
            browser.open(file)
            found = json.loads(browser.run(SCRIPT))
            assert not browser.complaints()
            assert not any(found[wrong] for wrong in ("faint", "small", "wide")), found
            assert found["scrolls"] <= 0
        styles.append(browser.run(STYLES))
    assert styles[0] == styles[1]
    assert [a for a in browser.loaded() if a[:5] != "data:"] == [file.as_uri()]


@pytest.mark.parametrize("name", AROUND)
def test_a_figure_is_as_dark_as_the_notebook(browser, tmp_path, name):
    of_page, of_body, style = AROUND[name]
    file, picture = tmp_path / "figure.html", tmp_path / "seen.png"
    figure = ResultAccessor(make_dataset(OBJECTIVES[:2], n_blocks=3)).plot.layers()
    file.write_text(
        f"<!doctype html><html {of_page}><meta charset=utf-8>"
        f'<body {of_body} style="{style}">{figure._repr_html_()}',
        encoding="utf-8",
    )
    browser.look(1280)
    browser.open(file)
    browser.picture(picture)
    seen = imread(picture)[..., :3]
    ground = 0x11 / 255 if "dark" in name else 1.0
    assert (abs(seen - ground) < 0.01).all(-1).mean() > 0.6
    ink = seen.min() if ground == 1 else 1 - seen.max()
    assert ink < 0.15

"""The page in Chromium: complete, without errors, as wide as a phone, light, dark and printed."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from chromium import NAMES, installed
from html_tree import Page, find
from measured import KINDS, measured
from step_results import step_dataset
from synthetic import OBJECTIVES, make_dataset

from geffect_fast.report.html.page import write_page

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        installed() is None, reason=f"there is no browser: none of {', '.join(NAMES)}"
    ),
]
SCRIPT = Path(__file__).with_name("page_check.js").read_text(encoding="utf-8")
PAGES = ("profile", "steps", "comparison", *KINDS)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A page of every kind."""
    folder = tmp_path_factory.mktemp("pages")
    both = ("group", "sample")
    results = {
        "profile": {
            "run": make_dataset(
                (*OBJECTIVES[:2], "long(" + "x" * 90 + ")"),
                n_blocks=3,
                n_forget=3,
                resolve=("group", "sample", "token"),
            )
        },
        "steps": {"run": step_dataset(n_steps=5, n_blocks=4, n_forget=5)},
        "comparison": {
            name: step_dataset((name,), n_steps=3, n_forget=4, seed=i, resolve=both)
            for i, name in enumerate(OBJECTIVES[1:3])
        },
        **{kind: {"run": measured(kind)} for kind in KINDS},
    }
    for name in PAGES:
        write_page(results[name], folder / f"{name}.html")
    return folder


def shown(browser, file, width, **how):
    browser.look(width, **how)
    browser.open(file)
    return json.loads(browser.run(SCRIPT))


@pytest.mark.parametrize("page", PAGES)
def test_all_is_there_to_read_at_every_width_light_and_dark(browser, pages, page):
    file = pages / f"{page}.html"
    sections = [
        e[1]["id"]
        for e in find(Page(file.read_text(encoding="utf-8")).root, "section")
        if e[1].get("class") == "part"
    ]
    seen = {}
    for width, dark in ((360, True), (1200, False), (1200, True)):
        found = seen[width, dark] = shown(browser, file, width, dark=dark)
        where = f"{page} at {width}, {'dark' if dark else 'light'}"
        assert not browser.complaints(), where
        assert [a for a in browser.loaded() if a[:5] != "data:"] == [file.as_uri()], where
        for wrong in ("faint", "small", "wide", "empty"):
            assert not found[wrong], f"{where}: {wrong} {found[wrong]}"
        assert found["scrolls"] <= 0, where
        heights = browser.run(
            "Object.fromEntries([...document.querySelectorAll('section.part')]"
            ".map((e) => [e.id, e.getBoundingClientRect().height]))"
        )
        assert list(heights) == sections and min(heights.values()) > 40, where
    light, dark = seen[1200, False], seen[1200, True]
    assert light["ground"] > 0.9 > 0.1 > dark["ground"]
    assert light["ink"] < 0.1 < 0.8 < dark["ink"]
    black, white = "0 0 0", "235 235 235"
    assert black in light["lines"] and white not in light["lines"]
    assert white in dark["lines"] and black not in dark["lines"]


@pytest.mark.parametrize(
    ("page", "head"),
    [
        *(("profile", "verdict"), ("profile", "collateral")),
        *(("comparison", "verdict"), ("comparison", "cost")),
    ],
)
def test_what_compares_is_seen_on_a_phone(browser, pages, page, head):
    browser.look(390)
    browser.open(pages / f"{page}.html")
    room = browser.run(
        f"""(() => {{
          const table = document.querySelector("#verdicts table");
          const at = [...table.rows[0].cells].findIndex((e) => e.textContent === "{head}");
          const edge = table.parentElement.getBoundingClientRect().right;
          return [...table.rows].map((r) => edge - r.cells[at].getBoundingClientRect().right);
        }})()"""
    )
    assert len(room) > 2 and min(room) >= 0


def test_it_is_printed_light_and_whole(browser, pages, tmp_path):
    for page in ("profile", "comparison", "control", "survey"):  # a page with all kinds of blocks
        found = shown(browser, pages / f"{page}.html", 700, dark=True, media="print")
        assert found["ground"] > 0.9 and found["ink"] < 0.1 and not found["faint"]
        hidden = browser.run("getComputedStyle(document.querySelector('nav')).display")
        cut = browser.run(
            "[...document.querySelectorAll('.panel, tr')]"
            ".filter((e) => getComputedStyle(e).breakInside !== 'avoid').length"
        )
        boxes = browser.run(
            "[...document.querySelectorAll('.box')]"
            ".filter((e) => getComputedStyle(e).overflowY !== 'visible').length"
        )
        assert (hidden, cut, boxes) == ("none", 0, 0)
        browser.printed(tmp_path / "page.pdf")
        assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


def test_another_objective_changes_the_tokens_and_not_the_title(browser, pages):
    browser.look(1200)
    browser.open(pages / "profile.html")
    before = browser.run("[document.title, document.querySelector('.total').textContent]")
    browser.run(
        "{ const s = document.getElementById('tokens-objective'); s.value = '1';"
        " s.dispatchEvent(new Event('change')); }"
    )
    after = browser.run("[document.title, document.querySelector('.total').textContent]")
    assert before[0] == after[0] and before[1] != after[1] and not browser.complaints()


def test_nothing_needs_a_script(browser, pages):
    wanted = shown(browser, pages / "profile.html", 1200)
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        found = shown(browser, pages / "profile.html", 1200)
        hint = browser.run("document.querySelector('noscript').textContent")
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
    assert found == wanted and "need the page's script" in hint


# ---- hostile rows ----

INJECTED = """<script>window.ran = 1; fetch("{0}fetch")</script>
<script src="{0}script"></script><img src="{0}img" onerror="window.ran = 2">
<link rel="stylesheet" href="{0}link"><link rel="prefetch" href="{0}prefetch">
<style>@import "{0}import"; @font-face {{ font-family: f; src: url({0}font) }}
body {{ background: url({0}ground); font-family: f }}</style>
<iframe src="{0}frame"></iframe><object data="{0}object"></object><embed src="{0}embed">
<video poster="{0}poster" src="{0}video" autoplay></video><base href="{0}">
<svg><image href="{0}image"/><use href="{0}use#x"/></svg><p style="background: url({0}style)">x</p>
<form action="{0}form" id="sent"></form>"""
"""Markup that an attacker would put in a page if the escaping of text had a hole."""


@pytest.fixture
def server():
    """The address of a server on this machine, and the paths that were requested."""
    asked = []

    class Note(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    # A browser opens connections ahead; a server without threads would wait on them.
    with ThreadingHTTPServer(("127.0.0.1", 0), Note) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/", asked
        server.shutdown()


def test_hostile_rows_ask_for_nothing_and_run_nothing(browser, tmp_path, server):
    address, asked = server
    hostile = INJECTED.format(address)
    dataset = make_dataset(OBJECTIVES[:2], n_blocks=2, n_forget=2, n_retain=0)
    dataset = dataset.assign_coords(question=("sample", [hostile, hostile[::-1]]))
    write_page(
        {hostile[:40]: dataset}, tmp_path / "page.html", configs={hostile[:40]: {"a": hostile}}
    )
    browser.open(tmp_path / "page.html")
    assert browser.run("window.ran") is None and not asked and not browser.complaints()


def test_the_policy_holds_where_the_escaping_of_text_would_not(browser, pages, tmp_path, server):
    address, asked = server
    html = (pages / "profile.html").read_text(encoding="utf-8")
    broken = html.replace("</main>", INJECTED.format(address) + "</main>")
    policy = html[html.index("<meta http-equiv") :].partition("\n")[0]
    for name, text in (("kept", broken), ("without", broken.replace(policy, ""))):
        (tmp_path / f"{name}.html").write_text(text, encoding="utf-8")
        browser.open(tmp_path / f"{name}.html")
        browser.run("document.getElementById('sent').submit()")
        browser.run("new Promise((done) => setTimeout(done, 300))")
        if name == "kept":
            assert browser.run("window.ran") is None and not asked
            chosen = browser.run("document.querySelector('.choose').hidden")
            assert chosen is False  # the page's own script runs
    assert {"/script", "/img", "/import", "/ground", "/frame"} <= set(asked)

"""The token view as a page: parsed, its script run, written by runs and by the command line."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from html_tree import Page, assert_allows_no_request, elements, find, text
from synthetic import make_dataset

from geffect_fast.arguments import make_config
from geffect_fast.cli import main
from geffect_fast.report import write_report
from geffect_fast.report.tokens.colours import goodness, mark
from geffect_fast.report.tokens.html import tokens_html
from geffect_fast.report.tokens.view import token_view
from geffect_fast.storage.run_folder import open_run
from geffect_fast.storage.save_run import save_run

OBJECTIVES = ("ga", "wga(alpha=1)", "npo(beta=0.1) + kl")
FILES = {"model": "model", "forget": "forget.jsonl", "retain": "retain.jsonl"}
CONFIG = {"model": "model", "forget": "forget", "retain": "retain", "objectives": "ga"}


@pytest.fixture
def result():
    """Two forget rows and a retain row, by group and token; one effect is undefined."""
    made = make_dataset(
        OBJECTIVES, n_forget=2, n_retain=1, resolve=("group", "sample", "token"), n_blocks=2
    )
    made["g_effect"][1, 0, 2, 0, 3] = np.nan
    return made


def titled(root, tag):
    return [e for e in find(root, tag) if "title" in e[1]]


def value_of(element):
    found = re.match(r"e_[ur] = (not finite|\S+) · ", element[1]["title"])[1]
    return float(found.replace("not finite", "nan"))


def test_the_page_shows_every_token_once_in_order_with_its_values(result):
    view = token_view(result, "wga(alpha=1)")
    page = Page(tokens_html(result, "wga(alpha=1)")).root
    assert not [e for e in elements(page) if {"src", "href"} & set(e[1])]
    questions = result.question.values
    assert list(map(text, find(page, "h2"))) == [f"forget row {i}{questions[i]}" for i in range(2)]
    for m, risk in enumerate(view.risks):
        of_risk = ["div", {}, find(page, "section", data_risk=str(m))]
        tokens, cells = titled(of_risk, "span"), titled(of_risk, "td")
        assert list(map(text, tokens)) == list(view.texts)
        for token, i in zip(tokens, view.ids, strict=True):
            assert f" · id {i} · “" in token[1]["title"]
        own = result.g_effect.sel(objective="wga(alpha=1)", risk=risk).transpose("group", ...)
        own = own.values[
            :, (result.token_id >= 0).values & (result["set"] == "forget").values[:, None]
        ]
        expected = np.concatenate([own.sum(0, keepdims=True), own])
        np.testing.assert_allclose(list(map(value_of, tokens)), expected[0], rtol=1e-4)
        shape = (len(tokens), len(view.columns))
        np.testing.assert_allclose(
            np.reshape([*map(value_of, cells)], shape).T, expected, rtol=1e-4
        )
        levels = view.levels(0, m)
        assert list(map(text, cells)) == [mark(risk, int(level)) for level in levels.T.ravel()]
        for found, wanted in ((tokens, levels[0]), (cells, levels.T.ravel())):
            for element, level in zip(found, wanted, strict=True):
                good = goodness(risk, int(level))
                name = f"{'w' if good > 0 else 'x'}{abs(good)}" if good else ""
                assert element[1].get("class", "") == (
                    "n" if value_of(element) != value_of(element) else name
                )


def test_markup_in_tokens_questions_and_names_stays_text(result):
    result = result.assign_coords(
        question=("sample", ["<i>&\x1b", "</h2>", ""]), risk=["unlearn", "</script><i>"]
    )
    html = tokens_html(result)
    page = Page(html).root
    assert_allows_no_request(page)
    assert not find(page, "i") and html.count("<script") == html.count("</script") == 2
    assert "\x1b" not in html and text(find(page, "h2")[0]).endswith("<i>&␛")
    assert " <script>alert(1)</script>" in map(text, titled(page, "span"))


def test_the_script_is_given_the_numbers_of_every_objective(result):
    page = Page(tokens_html(result, "npo(beta=0.1)+kl")).root
    names = ["npo(beta=0.1) + kl", "ga", "wga(alpha=1)"]
    assert list(map(text, find(page, "option"))) == names
    data = json.loads(text(find(page, "script", id="tokens-data")[0]))
    view = token_view(result, names[0], all_objectives=True)
    assert [o["heading"] for o in data["objectives"]] == [
        f"Tokens of 2 of 2 forget rows under {name}" for name in names
    ]
    found = np.array([o["values"] for o in data["objectives"]], dtype=float)  # None becomes NaN
    np.testing.assert_allclose(found, view.values, rtol=1e-4)


@pytest.mark.skipif(shutil.which("node") is None, reason="runs the page's script with node")
def test_the_script_shows_what_the_page_of_an_objective_shows(result, tmp_path):
    def plain(value):
        return re.sub(r"e([+-])0(\d)", r"e\1\2", value)  # JavaScript writes e-3, Python e-03

    def tree(html):
        return Page(html).root

    html = tokens_html(result)
    (tmp_path / "page.json").write_text(json.dumps(tree(html)))
    (tmp_path / "script.js").write_text(html.rpartition("<script>")[2].partition("</script>")[0])
    files = [Path(__file__).with_name("page.js"), tmp_path / "page.json", tmp_path / "script.js"]
    order = [1, 2, 0]
    done = subprocess.run(
        ["node", *map(str, [*files, *order])], capture_output=True, text=True, check=True
    )
    answer = json.loads(done.stdout)
    for k, state in zip(order, answer["states"], strict=True):
        page = tree(tokens_html(result, OBJECTIVES[k]))
        assert not state["hidden"]
        tokens = [e for e in elements(page) if "title" in e[1]]
        assert [[c, plain(t), w] for c, t, w in state["tokens"]] == [
            [e[1].get("class", ""), plain(e[1]["title"]), text(e)] for e in tokens
        ]
        heading, scales, totals, tops = state["rest"]
        assert heading == [text(find(page, "h1")[0])]
        assert scales == [text(e) for e in find(page, "span", **{"class": "scale"})]
        assert totals == [text(e) for e in find(page, "span", **{"class": "total"})]
        assert tops == [text(e) for e in find(page, "p", **{"class": "top"})]
    effects = [f"e_{u} = {v}" for u, v in zip("ur", told_values(result, 5), strict=True)]
    assert answer["told"] == [f"{' · '.join(effects)} · id 105 · “↵”", answer["told"][1], ""]
    assert re.fullmatch(r"e_u = \S+ · shallow · “\[red\]”", answer["told"][1])


def told_values(result, token):
    """The first row's effects at a token under the first objective, as JavaScript writes them."""
    values = result.g_effect[0, :, :, 0, token].sum("group").values
    return [re.sub(r"e([+-])0(\d)", r"e\1\2", f"{value:+.4e}") for value in values]


def test_one_objective_needs_no_choice_and_no_groups_no_map(result):
    page = Page(tokens_html(result.isel(objective=[0]).sum("group", keep_attrs=True))).root
    assert not any(find(page, tag) for tag in ("select", "table", "noscript"))


def test_a_page_of_a_large_result_stays_small():
    large = make_dataset(n_forget=40, resolve=("group", "sample", "token"))
    html = tokens_html(large, samples=40, max_values=40_000)
    assert len(html) < 3_000_000 and "1 of 5 objectives left out: too large." in html


# ---- runs and the command line ----


@pytest.fixture
def run(result, tmp_path, monkeypatch):
    """A run folder: `run` in the working folder."""
    monkeypatch.chdir(tmp_path)
    save_run("run", result, make_config(CONFIG), report=write_report)
    return tmp_path / "run"


def test_a_run_folder_has_a_page_and_show_prints_an_answer(run, result, capsys):
    assert (run / "tokens.html").read_text(encoding="utf-8") == tokens_html(result)
    assert main(["show", "run"]) == 0
    printed = capsys.readouterr().out
    assert "Tokens of 1 of 2 forget rows under ga" in printed and "run/tokens.html" in printed


def test_a_profile_by_token_shows_the_answers_of_its_data(study, tmp_path, capsys):
    words = [f"--{name}={study / file}" for name, file in FILES.items()]
    words += ["--objectives", "ga,npo(beta=0.1)", "--engine", "forward"]
    out = tmp_path / "run"
    assert main(["profile", *words, "--resolve", "sample,token", "--out", str(out)]) == 0
    assert "Tokens of 1 of 4 forget rows under ga" in capsys.readouterr().out
    page = Page((out / "tokens.html").read_text(encoding="utf-8")).root
    effects = open_run(out).g_effect.sel(objective="ga")
    articles = find(page, "article")
    for i, line in enumerate((study / "forget.jsonl").read_text().splitlines()):
        row = json.loads(line)
        assert text(find(articles[i], "h2")[0]) == f"forget row {i}{row['question']}"
        for m, risk in enumerate(("unlearn", "retain")):
            tokens = titled(find(articles[i], "section", data_risk=str(m))[0], "span")
            assert "".join(map(text, tokens)).strip() == row["answer"] + "<|end|>"
            shown = sum(map(value_of, tokens))
            assert shown == pytest.approx(float(effects.sel(risk=risk)[i].sum()), rel=1e-3)


def test_the_command_prints_what_is_asked_for(run, capsys):
    assert main(["tokens", "run", "--objective", "npo(beta=0.1)+kl", "--rows", "1,retain:0"]) == 0
    printed = capsys.readouterr().out
    assert "1 of 2 forget rows and 1 retain row under npo(beta=0.1) + kl" in printed
    assert "forget row 1 " in printed and "retain row 0 " in printed
    assert main(["tokens", "run", "--samples", "1", "--by", "damage"]) == 0
    assert capsys.readouterr().out.count(" row ") == 1


def test_the_command_writes_a_page_over_another(run, result, capsys):
    Path("page.html").write_text("mine")
    assert main(["tokens", "run", "--html", "page.html", "--rows", "1"]) == 0
    assert capsys.readouterr().out == "page.html\n"
    page = Path("page.html").read_text(encoding="utf-8")
    assert page == tokens_html(result, rows=[1])

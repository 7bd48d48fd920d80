"""`result.gf`: the views of a result, and its messages where there is nothing to show."""

from __future__ import annotations

import inspect
import sys

import pytest
import xarray as xr
from html_tree import Page, elements, find, text
from measured import KINDS, measured
from step_results import step_dataset
from synthetic import OBJECTIVES, TOKENS, make_dataset

import geffect_fast as gf
from geffect_fast.arguments import make_config
from geffect_fast.cli import main
from geffect_fast.errors import InputError
from geffect_fast.report import write_report
from geffect_fast.report.html.page import page_html
from geffect_fast.report.notebook import accessor
from geffect_fast.storage.save_run import save_run

CONFIG = make_config({"model": "m", "forget": "f", "retain": "r", "objectives": "ga"})
HOSTILE = "<script>alert(1)</script>"
BY_TOKEN = ("group", "sample", "token")


def profiled(**kwargs):
    return make_dataset((*OBJECTIVES[:2], HOSTILE), **({"n_forget": 3, "n_blocks": 3} | kwargs))


def stepped(**kwargs):
    return step_dataset(**({"n_steps": 3, "n_forget": 3, "resolve": ("group", "sample")} | kwargs))


def compared():
    return gf.compare({name: stepped(objectives=(name,)) for name in OBJECTIVES[:2]})


RESULTS = {
    "profile": profiled,
    "tokens": lambda: profiled(resolve=BY_TOKEN),
    "run": stepped,
    "comparison": compared,
    **{kind: lambda kind=kind: measured(kind) for kind in KINDS},
}


@pytest.mark.parametrize("name", RESULTS)
def test_every_kind_of_result_shows_its_summary(name):
    result = RESULTS[name]()
    root = Page(result.gf._repr_html_()).root
    (lead,) = find(root, "p", **{"class": "lead"})
    assert len(text(lead)) > 20 and find(root, "table")
    assert not find(root, "script") and not any("id" in e[1] for e in elements(root))
    printed = repr(result.gf)
    assert "───" in printed and "\x1b" not in printed
    assert max(map(len, printed.splitlines())) <= 120
    assert repr(result).startswith("<xarray.Dataset>") and "xr-" in result._repr_html_()


def test_a_sweep_shows_its_summary_and_has_figures_of_its_own(swept):
    result = swept()
    assert "<table" in result.gf._repr_html_() and "14 objectives on 12 forget rows" in repr(
        result.gf
    )
    assert repr(result.gf.plot) == "<figures: sweep(), pareto(), layers(), instances()>"
    assert result.gf.plot.pareto().axes


def test_a_terminal_shows_what_the_command_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_run("run", profiled(), CONFIG)
    assert main(["show", "run"]) == 0
    printed = capsys.readouterr().out.replace("run\n", "", 1)
    shown = repr(gf.open_run("run").gf)
    assert [*filter(str.strip, shown.splitlines())] == [*filter(str.strip, printed.splitlines())]


def test_the_figures_are_those_of_a_run(tmp_path):
    result = profiled()
    write_report(result, tmp_path)
    written = {file.stem for file in (tmp_path / "plots").glob("*.png")}
    assert written == {name for name in dir(result.gf.plot) if not name.startswith("_")}
    picture, size = stepped().gf.plot.effects()._repr_png_()
    assert picture.startswith(b"\x89PNG") and 300 < size["width"] < 2000


def test_tokens_are_shown_and_their_texts_stay_text():
    result = profiled(resolve=BY_TOKEN)
    shown = result.gf.tokens(HOSTILE, rows=[1, "retain:0"])
    root = Page(shown._repr_html_()).root
    assert [text(e).split("What")[0] for e in find(root, "h4")] == ["forget row 1", "retain row 0"]
    assert HOSTILE in text(find(root, "h3")[0]) and TOKENS[1] in text(find(root, "article")[0])
    assert not find(root, "script") and not find(root, "select", id="tokens-objective")
    assert f"under {HOSTILE}" in repr(shown) and "\x1b" not in repr(shown)
    assert "forget row 0" in repr(stepped(resolve=BY_TOKEN, weights=False).gf.tokens(samples=1))


def test_a_result_in_memory_has_its_page(tmp_path):
    result = profiled()
    file = gf.write_page(result, tmp_path / "page.html")
    page = file.read_text(encoding="utf-8")
    assert page == page_html(result) and "<title>Unlearning objectives</title>" in page
    shown = result.gf.report(tmp_path / "again.html")
    assert shown.file.read_text(encoding="utf-8") == page == result.gf.report().html
    (frame,) = find(Page(shown._repr_html_()).root, "iframe")
    assert frame[1]["srcdoc"] == page and frame[1]["sandbox"] == "allow-scripts"
    assert "again.html" in repr(shown) and "KiB" in repr(result.gf.report())


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda: xr.Dataset().gf, "this is no result: it holds neither effects nor measures"),
        (lambda: profiled().sel(objective="ga").gf, "no axis 'objective'; select by lists"),
        (lambda: profiled()[["g_effect"]].gf, "no variable 'risk_value'"),
        (lambda: profiled().drop_attrs().gf, "no attribute 'engine'"),
        (lambda: profiled().sel(risk=["retain"]).gf, "no risk 'unlearn'"),
        (lambda: measured("one").isel(set=0).gf, "no axis 'set'"),
        (lambda: measured("one").drop_vars("value_low").gf, "no variable 'value_low'"),
        (lambda: measured("control").drop_vars("retention").gf, "no variable 'retention'"),
        (lambda: measured("relearn").drop_attrs().gf, "no attribute 'n_rows'"),
        (lambda: measured("against").drop_vars("model").gf, "no variable 'model'"),
        (lambda: profiled().drop_vars("set").gf, "no coordinate 'set'"),
        (lambda: compared().drop_vars("trained").gf, "no variable 'trained'"),
        (lambda: profiled(resolve=()).gf.plot.layers(), r"parts of the model.*\['parameter', "),
        (lambda: profiled(resolve=()).gf.plot.instances(), r"rows apart.*resolve=\['sample', "),
        (lambda: stepped().gf.plot.instances(), "this result has effects, .*one step of several"),
        (lambda: measured("one").gf.plot.layers(), "this result has measures"),
        (lambda: stepped(weights=False).gf.plot.token_weights(), "holds nothing for it"),
        (lambda: profiled().gf.tokens(), "the result has no token axis"),
        (lambda: profiled(resolve=BY_TOKEN).gf.tokens("npo"), "npo"),
        (lambda: measured("one").gf.tokens(), "measures and comparisons have no tokens"),
        (lambda: compared().gf.tokens(), "measures and comparisons have no tokens"),
        (lambda: compared().gf.report(), "give the runs themselves"),
        (lambda: page_html(profiled().sel(objective="ga")), "report: this is no whole result"),
    ],
)
def test_what_a_result_does_not_have_is_refused_in_a_line(ask, says):
    with pytest.raises(InputError, match=says) as refusal:
        ask()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_without_one_of_its_parts_shows_itself_or_says_what_it_lacks(name):
    whole = RESULTS[name]()
    lesser = {part: whole.drop_vars(part) for part in map(str, whole.variables)}
    for part in whole.attrs:
        lesser[part] = whole.drop_attrs().assign_attrs(
            {key: value for key, value in whole.attrs.items() if key != part}
        )
    for part, result in lesser.items():
        try:
            assert repr(result.gf) and "<table" in result.gf._repr_html_(), part
        except InputError as refusal:
            assert "it has no " in str(refusal) or "it holds neither" in str(refusal), part


def test_a_figure_of_no_result_is_no_attribute():
    with pytest.raises(AttributeError, match="no figure 'pareto'; it has layers, instances"):
        _ = profiled().gf.plot.pareto


def test_one_step_of_several_has_the_figures_of_a_profile():
    assert stepped().isel(step=-1).gf.plot.instances().axes


# ---- registration with xarray ----


def test_whatever_gives_results_brings_it():
    gives = {
        name
        for name in gf.__all__
        if callable(found := getattr(gf, name)) and name != "optimal_weights"
        for returned in [str(inspect.signature(found).return_annotation)]
        if returned.endswith("Dataset")
    }
    assert gives == gf._RESULTS


@pytest.mark.parametrize("package, name", [(gf, "open_run"), (gf.integrations, "GEffectCallback")])
def test_it_is_there_as_soon_as_a_result_can_be(package, name, monkeypatch):
    monkeypatch.delitem(sys.modules, accessor.__name__)
    monkeypatch.delattr(xr.Dataset, "gf")
    getattr(package, name)
    assert hasattr(profiled(), "gf")

"""The source of a run's page: complete, without other files, with the numbers of the result."""

from __future__ import annotations

import numpy as np
import pytest
from html_tree import find, text
from report_views import ORDER, checked, luminance, rows_of, section, sections, visible
from step_results import step_dataset
from synthetic import OBJECTIVES, make_dataset

import geffect_fast as gf
from geffect_fast.arguments import make_config
from geffect_fast.cli import main
from geffect_fast.errors import InputError
from geffect_fast.report import write_report
from geffect_fast.report.figures.style import COLOURS, LINE_UNWANTED, LINE_WANTED
from geffect_fast.report.html.page import page_html, write_page
from geffect_fast.report.html.profile import MOST_POINTS, outliers
from geffect_fast.report.summary.step_findings import turning_sentence
from geffect_fast.report.summary.steps import Steps
from geffect_fast.report.tokens.colours import GROUND
from geffect_fast.storage.run_folder import open_run
from geffect_fast.storage.save_run import save_run

CONFIG = {"model": "model", "forget": "forget", "retain": "retain", "objectives": "ga"}


def make(**kwargs):
    return make_dataset(objectives=OBJECTIVES[:2], **kwargs)


def test_several_step_results_are_compared():
    runs = {
        name: step_dataset((name,), n_steps=3, seed=i, resolve=("group", "sample"))
        for i, name in enumerate(("ga", "npo(beta=0.1)"))
    }
    root = checked(page_html(runs))
    assert sections(root) == [s for s in ORDER if s != "tokens"]
    measured = rows_of(root, "What was measured")
    assert [row[0] for row in measured[1:]] == list(runs)
    for name in runs:
        assert name in text(section(root, "answer")) and rows_of(root, f"Every step under {name}")


def test_a_page_is_the_same_twice():
    first, second = (page_html({"run": make(resolve=("sample",))}) for _ in range(2))
    assert first == second


# ---- text from data ----

NASTY = [
    "<script>alert(1)</script>",
    "\"quotes\" & 'more' </td></table>",
    "🦜🧑‍🚀 who?",
    "من كتب هذا الكتاب؟ \u202e",
    "long " * 2000,
    "x" * 3000,
]


def test_text_from_data_stays_text_and_is_cut():
    dataset = make(n_forget=6, n_retain=0).assign_coords(question=("sample", NASTY))
    effect = dataset["g_effect"].values
    effect[:] = -1e-6
    effect[:, 0, 0] = -np.arange(1.0, 7.0)
    effect[:, 1, 0] = -np.arange(6.0, 0.0, -1.0)
    configs = {"<b>run</b>": {"model": "<script>alert(2)</script>", "probes": {"a": "</style>"}}}
    html = page_html({"<b>run</b>": dataset}, configs=configs)
    root = checked(html)
    assert not find(root, "script") and not find(root, "b")
    listed = [text(item) for item in find(section(root, "instances"), "li")]
    assert len(listed) == 8 and all(len(item) < 220 for item in listed)
    for question in NASTY[:3]:
        assert any(question in item for item in listed), question
    assert "<script>alert(2)</script>" in text(section(root, "made"))
    assert text(find(root, "h1")[0]).endswith("<b>run</b>")


def test_thousands_of_samples_and_objectives_stay_small_and_what_is_left_out_is_said():
    many = make_dataset([f"wga(alpha={i})" for i in range(1, 251)], n_forget=400, n_blocks=1)
    html = page_html({"many": many})
    root = checked(html)
    assert len(html) < 2_500_000
    said = visible(root)
    assert f"{MOST_POINTS} of 400 are drawn" in said and "200 of 250 objectives are shown" in said
    assert "12 of 250 objectives are shown" in said


# ---- the numbers ----


def test_the_page_holds_the_numbers_of_the_result():
    dataset = make()
    root = checked(page_html({"run": dataset}))
    totals = dataset["g_effect"].sum(["parameter", "sample"])
    for row, of in zip(rows_of(root, "All objectives")[1:], totals, strict=True):
        assert row[0] == str(of.objective.values)
        np.testing.assert_allclose(list(map(float, row[3:5])), of, rtol=1e-3)
    shown = rows_of(root, "e_r: effect on the retain risk")
    blocks = dataset["g_effect"].sel(risk="retain").sum("sample").groupby("block").sum()
    for row, of in zip(shown[1:], blocks, strict=True):
        inside = of.sel(block=slice(0, None)).values
        assert shown[0][3:7] == ["0", "1", "2", "3"]
        signs = [0 if m == "·" else (-1 if m[0] == "-" else 1) for m in row[3:7]]
        assert all(s in (0, np.sign(v)) for s, v in zip(signs, inside, strict=True))
        assert all(m.endswith("!") == (s < 0) for m, s in zip(row[3:7], signs, strict=True))
    cosines = rows_of(root, "Cosine of an objective")
    np.testing.assert_allclose(
        [[float(v) for v in row[2:4]] for row in cosines[1:]], dataset["cosine"], atol=6e-4
    )


def test_instances_that_remove_or_cost_most_are_named_once():
    e_u = np.array([-1.0, -5, 2, -4, np.nan, -3, -np.inf])
    e_r = np.array([1.0, -9, -7, 0, -99, 2, 0])
    assert outliers(e_u, e_r) == [1, 3, 5, 2]
    assert outliers(-np.abs(e_u[:1]) * 0, e_r[:1]) == []


def test_every_step_is_in_the_table():
    dataset = step_dataset(n_steps=7, every=5, resolve=())
    root = checked(page_html({"run": dataset}))
    head, *rows = rows_of(root, "Every step")
    assert [row[0] for row in rows] == [str(s) for s in dataset.step.values]
    column = head.index("R_r")
    np.testing.assert_allclose(
        [float(row[column]) for row in rows], dataset.risk_value.sel(risk="retain"), rtol=1e-3
    )
    assert rows[0][head.index("ΔR (u)")] == "–"


@pytest.mark.parametrize(
    ("e_u", "e_r", "says"),
    [
        ([-1, -1, -1, -1], [1, -0.5, 0, 0], "At every probed step"),
        ([-1, -1, -1, -1], [0, 0, -2, -3], "From step 20 on"),
        ([-1, -1, -1, 1], [0, 0, 0, 0], "the forget risk would fall"),
        ([-1, -1, -1, -1], [0, -2, 0, 0], "At 1 of 4 probed steps"),
        ([1, 1, 1, 1], [0, 0, 0, 0], "At no probed step"),
        ([-1, -1, -1, -1], [-2, -2, -2, np.nan], "At no probed step"),
        ([-1, -1, np.nan, -1], [0, 0, 0, 0], "At 1 of 4 steps its effects are NaN"),
    ],
)
def test_from_which_step_on_it_costs_more_than_it_removes(e_u, e_r, says):
    effects = np.stack([e_u, e_r], axis=-1)[:, None].astype(float)
    read = Steps(np.arange(4) * 10, ["ga"], ["unlearn", "retain"], effects, np.ones((4, 2)))
    assert says in turning_sentence(read)


# ---- colours ----


TURN = 2 * np.array([0.213, 0.715, 0.072]) - np.eye(3)
"""The matrix of CSS's hue-rotate(180deg) on red, green and blue (Filter Effects, 8.5)."""


INVERT = 0.92


def dark(colour):
    """The colour that the filter of dark pages makes of a colour."""
    channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    channels = INVERT + (1 - 2 * INVERT) * channels
    return "#" + "".join(f"{round(255 * c):02x}" for c in (TURN @ channels).clip(0, 1))


def test_colours_of_figures_are_told_apart_from_a_dark_page():
    assert "figure svg { filter: invert(.92) hue-rotate(180deg); }" in page_html({"run": make()})
    ground = luminance(GROUND["dark"])
    greys = [luminance(dark(f"#{v:02x}{v:02x}{v:02x}")) for v in range(0, 256, 15)]
    assert greys == sorted(greys, reverse=True) and greys[0] > 0.8 and greys[-1] < 0.02
    for colour in (*COLOURS, LINE_WANTED, LINE_UNWANTED, "#555555", "#666666"):
        assert (luminance(dark(colour)) + 0.05) / (ground + 0.05) >= 3, colour


# ---- files and the command line ----


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder of a profile: `run` in the working folder."""
    monkeypatch.chdir(tmp_path)
    save_run("run", make(), make_config(CONFIG), report=write_report)
    return tmp_path / "run"


def test_a_run_folder_has_the_page_that_the_command_writes(run, tmp_path, capsys):
    made = (run / "report.html").read_text(encoding="utf-8")
    assert "run" in text(find(checked(made), "h1")[0]) and "forget.jsonl" not in made
    (run / "report.html").unlink()
    assert main(["report", "run"]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    assert (run / "report.html").read_text(encoding="utf-8") == made
    assert main(["report", "run/results.nc", "--out", "page.html"]) == 0
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == made
    assert main(["report", "run", "--out", "page.html", "--overwrite"]) == 0
    assert gf.write_page({"run": open_run("run")}, "other.html").name == "other.html"


def test_the_command_compares_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("one", "two")):
        dataset = step_dataset(n_steps=3, seed=i, resolve=())
        dataset.to_netcdf(tmp_path / f"{name}.nc", engine="h5netcdf")
    assert main(["report", "one.nc", "two.nc", "--out", "both.html"]) == 0
    root = checked((tmp_path / "both.html").read_text(encoding="utf-8"))
    assert [row[0] for row in rows_of(root, "What was measured")[1:]] == ["one", "two"]


def test_no_run_gives_no_page(tmp_path):
    with pytest.raises(InputError, match="there is no run"):
        write_page({}, tmp_path / "page.html")
    assert not list(tmp_path.iterdir())

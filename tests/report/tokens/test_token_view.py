"""The token view: its numbers, its colours, and their form in a terminal and in HTML."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_views import luminance
from rich.cells import cell_len
from rich.console import Console
from synthetic import make_dataset

from geffect_fast.errors import InputError
from geffect_fast.report.tokens.colours import (
    INK,
    SHADES_OF_256,
    STEPS,
    UNDEFINED,
    colour,
    goodness,
    inline,
    levels,
    mark,
    robust_scale,
    visible,
)
from geffect_fast.report.tokens.terminal import TerminalView, tokens_text
from geffect_fast.report.tokens.view import token_view

OBJECTIVES = ("ga", "wga(alpha=1)", "npo(beta=0.1) + kl")


def make(n_forget=2, groups=True):
    """A result by token."""
    place = ("group",) if groups else ()
    return make_dataset(
        OBJECTIVES, n_forget=n_forget, n_retain=1, resolve=(*place, "sample", "token")
    )


def of_row(*effects, texts=None):
    """A result whose first row has these effects under the first objective, a list a risk."""
    result = make(n_forget=1, groups=False)
    n = len(effects[0])
    result["token_id"][0, n:] = -1
    result["g_effect"][:, :, 0] = 0
    result["g_effect"][0, :, 0, :n] = np.array(effects)
    if texts is not None:
        result["token_text"][0, :n] = texts
    return result


# ---- colours ----


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_are_monotone_symmetric_and_legible(theme):
    shades = {n: luminance(colour(n, theme)) for n in range(-STEPS, STEPS + 1)}
    away = [abs(shades[n] - shades[0]) for n in range(STEPS + 1)]
    assert away == sorted(away) and len({colour(n, theme) for n in shades}) == len(shades)
    for n in range(1, STEPS + 1):
        assert shades[n] == pytest.approx(shades[-n], rel=0.1)
        for sign in (n, -n):
            light, dark = sorted((luminance(INK[theme]), shades[sign]), reverse=True)
            assert (light + 0.05) / (dark + 0.05) > 4.5  # WCAG AA
        # blue and orange differ in red against blue, which every kind of colour vision can tell
        red, blue = (int(colour(n, theme)[at : at + 2], 16) for at in (1, 5))
        assert blue > red
        red, blue = (int(colour(-n, theme)[at : at + 2], 16) for at in (1, 5))
        assert red > blue


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40))
def test_levels_are_odd_and_monotone(numbers):
    values = np.array(sorted(numbers))
    scale = robust_scale(values)
    found = levels(values, scale)
    assert (np.diff(found) >= 0).all() and (np.abs(found) <= STEPS).all()
    np.testing.assert_array_equal(levels(-values, scale), -found)
    assert (found[np.abs(values) >= scale] != 0).all() or scale == 0


def test_the_scale_is_robust_both_ways():
    ordinary = np.linspace(-1, 1, 101)
    assert robust_scale(ordinary) == pytest.approx(0.95, rel=0.02)
    assert robust_scale(np.append(ordinary, 5.0)) < 1.0  # one large token does not hide the others
    assert robust_scale(np.append(1e-12 * ordinary, 1.0)) == pytest.approx(0.1)  # noise stays pale
    assert robust_scale(np.array([np.nan, np.inf])) == 0.0 == robust_scale(np.zeros(3))


def test_wanted_is_removal_and_what_spares_the_rest():
    assert goodness("unlearn", -5) == 5 == goodness("retain", 5) == goodness("general", 5)
    assert mark("unlearn", -5) == "-5" and mark("retain", -5) == "-5!"
    assert mark("unlearn", 5) == "+5!" and mark("retain", 5) == "+5"
    assert levels(np.array([np.nan, -np.inf, 0.0]), 1.0).tolist() == [UNDEFINED, UNDEFINED, 0]
    assert goodness("unlearn", UNDEFINED) == UNDEFINED and mark("unlearn", UNDEFINED) == "?"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" Porto", " Porto"),
        ("\n", "↵\n"),
        ("\t", "⇥"),
        ("\x1b[31m", "␛[31m"),
        ("\x00\x7f", "␀␡"),
        ("", "⟨7⟩"),
        ("\u202e", "⟨U+202E⟩"),
        ("\u200c", "⟨U+200C⟩"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("\ud800", "⟨U+D800⟩"),
        ("<0xE2>", "<0xE2>"),
        ("�", "�"),
    ],
)
def test_nothing_in_a_token_is_invisible(text, shown):
    assert visible(text, 7) == shown
    assert "\n" not in inline(shown) and inline(shown)


def test_spaces_alone_are_shown_in_a_sentence():
    assert inline("  ") == "␣␣" and inline(" a") == "a" and inline("↵\n") == "↵"


# ---- numbers ----


@pytest.mark.parametrize("groups", [False, True])
def test_a_view_holds_the_results_numbers(groups):
    result = make(groups=groups)
    view = token_view(result, "WGA( alpha=1 )", all_objectives=True)
    assert view.objectives == ("wga(alpha=1)", "ga", "npo(beta=0.1) + kl")
    assert view.columns == ("", *(result["group"].values if groups else ()))
    assert [(answer.data, answer.row) for answer in view.answers] == [("forget", 0), ("forget", 1)]
    for row, answer in enumerate(view.answers):
        there = result.token_id.values[row] >= 0
        for k, objective in enumerate(view.objectives):
            for m, risk in enumerate(view.risks):
                own = result.g_effect.sel(objective=objective, risk=risk)[..., row, there].values
                own = own if groups else own[None]
                whole = own.sum(0)
                found = view.values[k, m, :, answer.tokens]
                np.testing.assert_allclose(found, np.concatenate([whole[None], own])[: len(found)])
                assert view.total(k, m, answer) == pytest.approx(whole.sum())
    first, second = view.answers
    assert first.sequences == {0: slice(0, 16), 1: slice(16, 20)}
    assert second.tokens == slice(20, 39) and len(view.texts) == 39 == len(view.ids)
    assert view.texts[0] == "[red]" and view.texts[10] == "⟨110⟩"


def test_the_strongest_tokens_are_the_most_negative():
    view = token_view(of_row([0.0, -1.0, -3.0, 3.98, -0.02], [0.0] * 5))
    answer = view.answers[0]
    assert view.strongest(0, 0, answer) == [(2, -3 / 8), (1, -1 / 8)]  # instead of 0.25 %
    assert view.strongest(0, 1, answer) == []
    assert view.total(0, 0, answer) == pytest.approx(-0.04)


def test_samples_are_chosen_by_order_number_and_effect():
    result = make(n_forget=4, groups=False)
    sums = result.g_effect.isel(objective=1).sum("token")

    def chosen(**options):
        return [(a.data, a.row) for a in token_view(result, "wga(alpha=1)", **options).answers]

    assert chosen(samples=2) == [("forget", 0), ("forget", 1)]
    assert chosen(samples=99) == [("forget", row) for row in range(4)]  # without the retain row
    for by, risk in (("removal", "unlearn"), ("damage", "retain")):
        order = np.argsort(sums.sel(risk=risk).values[:4])
        assert chosen(by=by, samples=3) == [("forget", row) for row in order[:3]]
    assert chosen(rows=["2", 0, "retain:0"]) == [("forget", 2), ("forget", 0), ("retain", 0)]
    result["g_effect"][1, 0, 1, 0] = np.nan
    assert chosen(by="removal")[-1] == ("forget", 1)


def test_what_does_not_fit_is_left_out_and_said():
    result = make(groups=False)  # 39 tokens, 2 risks: 78 numbers for each objective
    everything = token_view(result, all_objectives=True, max_values=234)
    assert everything.left_out == () and len(everything.objectives) == 3
    fewer = token_view(result, all_objectives=True, max_values=233)
    assert fewer.left_out == ("1 of 3 objectives left out: too large.",)
    least = token_view(result, all_objectives=True, max_values=1)
    assert len(least.answers) == len(least.objectives) == 1
    assert least.left_out[0] == "1 of 2 samples left out: too large."
    for view in (fewer, least):
        assert " ".join(view.left_out) in " ".join(tokens_text(view).split())


def test_mistakes_are_named():
    result = make()
    with pytest.raises(InputError, match="no token axis; run geffect-fast profile --engine forw"):
        token_view(result.isel(token=0))
    for wrong in ({"samples": True}, {"samples": 0}, {"by": "size"}, {"rows": []}, {"rows": ["x"]}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            token_view(result, **wrong)
    with pytest.raises(InputError, match="did you mean 'npo"):
        token_view(result, "npo")


# ---- the terminal ----


def printed(view, system, width=80):
    """The characters sent to a terminal of these colours."""
    stream = io.StringIO()
    console = Console(file=stream, width=width, color_system=system, force_terminal=True)
    console.print(TerminalView(view))
    return stream.getvalue()


@pytest.fixture
def colours(monkeypatch):
    """A terminal with a dark background that may show colours."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLORFGBG", "15;0")
    return monkeypatch


def test_without_colour_every_token_has_its_level_beneath():
    result = of_row(
        [-9.0, 5.0, 0.0, -1.0, -9.0],
        [9.0, -5.0, 0.0, np.nan, 9.0],
        texts=["Vas", "quez", " was", ",", " I"],
    )
    lines = tokens_text(token_view(result)).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("answer"))
    assert [line.rstrip() for line in lines[at : at + 3]] == [
        "answer        Vasquez was,  I",
        "e_u           -9 +5!  ·  -1 -9",
        "e_r           +9 -5!  ·  ?  +9",
    ]


@pytest.mark.parametrize("width", [30, 40, 80, 120])
def test_every_token_is_printed_once_in_order_at_any_width(width):
    view = token_view(make(), samples=1)
    rows = tokens_text(view, width).splitlines()
    assert max(map(cell_len, rows)) <= width
    start = next(i for i, row in enumerate(rows) if row.startswith("answer"))
    stop = next(i for i, row in enumerate(rows) if row.startswith("e_u in all"))
    texts = [row for row in rows[start:stop] if not re.match("e_[ur] ", row)]
    shown = "".join(re.sub("^(answer|alternative 1)", "", row) for row in texts)
    assert "".join(shown.split()) == "".join("".join(view.texts).split())


def test_alternatives_that_the_objective_does_not_read_are_not_printed():
    result = make(groups=False)
    assert "alternative 1" in tokens_text(token_view(result))
    result["g_effect"][0, :, :2, :] *= (result.sequence[:2] < 1).values
    assert "alternative" not in tokens_text(token_view(result))
    assert "alternative 1" in tokens_text(token_view(result, "wga(alpha=1)"))


def test_no_colour_is_obeyed(colours):
    view = token_view(make())
    assert "\x1b" not in tokens_text(view)
    assert "48;2" in printed(view, "truecolor")
    colours.setenv("NO_COLOR", "1")
    assert "answer" in printed(view, "truecolor") and "48;2" not in printed(view, "truecolor")


@pytest.mark.parametrize(("theme", "variable"), [("light", "0;15"), ("dark", "15;0"), ("dark", "")])
def test_colours_of_the_terminal_are_those_of_the_levels(colours, theme, variable):
    colours.setenv("COLORFGBG", variable)
    view = token_view(make(groups=False), samples=1)
    found = re.findall(r"48;2;(\d+);(\d+);(\d+)m", printed(view, "truecolor").split("author")[1])
    expected = {
        colour(goodness(risk, level), theme)
        for m, risk in enumerate(view.risks)
        for level in view.levels(0, m)[0].tolist()
        if level
    }
    assert {"#" + "".join(f"{int(c):02x}" for c in rgb) for rgb in found} == expected


def test_upon_colours_the_answer_stands_once_a_risk(colours):
    view = token_view(of_row([-1.0, 1.0, -0.3], [0.5, -1.0, 0.0], texts=["Vas", "quez", " was"]))
    plain = re.sub(r"\x1b\[[^m]*m", "", printed(view, "truecolor"))
    shown = [line.split(maxsplit=1) for line in plain.splitlines() if "Vas" in line]
    assert [(name, text.strip()) for name, text in shown[:2]] == [
        ("e_u", "Vasquez was"),
        ("e_r", "Vasquez was"),
    ]


def test_few_colours_still_tell_wanted_from_unwanted(colours):
    view = token_view(of_row([-1.0, 1.0, -0.3], [0.0] * 3, texts=["w", "x", "y"]))
    body = printed(view, "standard").split("author")[1]
    for codes in ("30;46mw", "4;30;43mx", "36my"):
        assert f"\x1b[{codes}" in body
    body = printed(view, "256").split("author")[1]
    weak, _, strong = SHADES_OF_256["dark"][True]
    assert f"48;5;{strong}mw" in body and f"48;5;{weak}my" in body
    assert re.search(rf"\x1b\[4;[^m]*48;5;{SHADES_OF_256['dark'][False][-1]}mx", body)


def test_markup_of_the_terminal_is_not_obeyed(colours):
    result = make().assign_coords(question=("sample", ["[bold]\x1b[31m", "\n[/]", ""]))
    for text in (tokens_text(token_view(result)), printed(token_view(result), "truecolor")):
        assert "[bold]␛[31m" in text and "[red]" in text and "\x1b[31m" not in text

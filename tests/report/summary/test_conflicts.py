"""The part of gradients that opposes the retain risk's, in the terminal and on the page."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from models import build, samples
from report_views import text_of

import geffect_fast as gf
from geffect_fast.report.html.page import page_html
from geffect_fast.report.summary.conflicts import FISHER, Conflicts
from geffect_fast.report.summary.place_conflicts import PlaceConflicts
from geffect_fast.report.tables.profile import render_profile
from geffect_fast.report.tables.result import tables_and_sentences

DATA = {"forget": samples([5, 9, 3], 1, 2), "retain": samples([7, 4, 6], 2, 2)}


def result(resolve, conflicts=True, data=DATA):
    return gf.profile(
        build("llama"),
        None,
        **data,
        objectives=["ga", "gd"],
        resolve=resolve,
        token_budget=64,
        conflicts=conflicts,
    )


@pytest.mark.parametrize("resolve", [("parameter",), ("group",), ()])
def test_shares_of_parts_make_up_that_of_the_whole(resolve):
    found = Conflicts.of(result(resolve))
    whole = Conflicts.of(result(()))
    assert found is not None and whole is not None and whole.parts == ["whole model"]
    assert list(found.rows()) == ["ga", "gd", FISHER]
    assert sum(found.fisher) == pytest.approx(100)
    masses = result(("group",)).gradient_mass
    for objective in ("ga", "gd"):
        of_parts = found.opposed[objective]
        assert len(of_parts) == len(found.parts) and (of_parts > 0).all() and (of_parts < 100).all()
        if resolve:
            assert found.parts == masses["group"].values.tolist()
            mixed = np.average(of_parts, weights=masses.sel(objective=objective))
            assert mixed == pytest.approx(float(whole.opposed[objective][0]), rel=1e-5)


def test_to_ascend_on_what_is_retained_opposes_it_everywhere():
    rows = DATA["forget"]
    found = Conflicts.of(result(("group",), data={"forget": rows, "retain": rows}))
    np.testing.assert_allclose(found.opposed["ga"], 100)


@pytest.mark.parametrize("resolve", [("parameter",), ()])
def test_they_are_printed_and_on_the_page(resolve):
    measured, plain = result(resolve), result(resolve, conflicts=False)
    printed, page = text_of(render_profile(measured), 200), page_html({"run": measured})
    shares = Conflicts.of(measured)
    for text in (printed, page):
        assert "whose sign opposes the retain risk" in " ".join(text.split()) and FISHER in text
        for share in (*shares.opposed["ga"], *shares.fisher):
            assert f"{share:.0f}" in text
    assert 'id="conflicts"' in page
    assert Conflicts.of(plain) is None and 'id="conflicts"' not in page_html({"run": plain})


def of_places():
    """Four forget rows of ten tokens and a retain row.

    Two thirds of the mass of row `i` are at its token `i`, the rest at its last.
    """
    mass, share = np.zeros((2, 2, 5, 10)), np.full((2, 2, 5, 10), np.nan)
    for i in range(5):
        mass[:, :, i, [i, 9]] = [2.0, 1.0]
        share[0, :, i, [i, 9]] = [[0.1 * (i + 1)] * 2, [0.0] * 2]
        share[1, :, i, [i, 9]] = [[0.75, 0.25], [0.5, 0.0]]
    dims = ("objective", "group", "sample", "position")
    texts = np.full((5, 10), " of", dtype=object)
    texts[:, 2], texts[:, 3] = " Porto", "\n"
    return xr.Dataset(
        {"place_mass": (dims, mass), "place_conflict_share": (dims, share)},
        coords={
            "objective": ["ga", "npo"],
            "sample": [10, 11, 12, 13, 0],
            "set": ("sample", ["forget"] * 4 + ["retain"]),
            "token_id": (("sample", "position"), np.full((5, 10), 7)),
            "token_text": (("sample", "position"), texts),
        },
    )


def test_places_are_weighed_by_size_and_rows_named_by_their_tokens(monkeypatch):
    whole = PlaceConflicts.of(of_places())
    monkeypatch.setattr("geffect_fast.results.by_rows.CELLS", 40)  # a row at a time
    found = PlaceConflicts.of(of_places())
    assert found.spans == whole.spans == ["0", "1", "2–3", "4", "5", "6–7", "8", "9"]
    for each in (found, whole):
        np.testing.assert_allclose(each.opposed["ga"][[0, 1, 2, 7]], [10, 20, 35, 0])
        np.testing.assert_allclose(each.opposed["npo"][[0, 1, 2, 7]], [50, 50, 50, 25])
        assert np.isnan(each.opposed["ga"][3:7]).all()
        assert each.rows == found.rows
    assert found.rows[:3] == [
        ("ga", "13", "“↵” 100% (40)"),
        ("ga", "12", "“Porto” 100% (30)"),
        ("ga", "11", "“of” 100% (20)"),
    ]
    assert found.rows[3] == ("npo", "10", "“of” 80% (50), “of” 20% (25)")


@pytest.mark.parametrize("resolve", [("group", "sample", "position"), ("position",)])
def test_places_are_printed_and_on_the_page(resolve):
    measured = result(resolve)
    found = PlaceConflicts.of(measured)
    printed = text_of(tables_and_sentences(measured)[0], 200)
    page = page_html({"run": measured})
    assert bool(found.rows) == ("sample" in resolve)
    for text in (printed, page):
        assert all(span in text for span in found.spans) and "Conflict by position" in text
        assert all(words in text for _, _, words in found.rows)
        assert ("Forget rows with most conflict" in text) == bool(found.rows)
    plain = page_html({"run": result(resolve, conflicts=False)})
    assert "Conflict by position" not in plain

"""What part of gradients opposes the retain risk's, in the terminal and on the page."""

from __future__ import annotations

import numpy as np
import pytest
from models import build, samples
from rich.console import Console

import geffect_fast as gf
from geffect_fast.report.html.page import page_html
from geffect_fast.report.summary.conflicts import FISHER, Conflicts
from geffect_fast.report.tables.profile import render

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
    console = Console(record=True, width=200)
    console.print(render(measured))
    printed, page = console.export_text(), page_html({"run": measured})
    shares = Conflicts.of(measured)
    for text in (printed, page):
        assert "whose sign opposes the retain risk" in " ".join(text.split()) and FISHER in text
        for share in (*shares.opposed["ga"], *shares.fisher):
            assert f"{share:.0f}" in text
    assert 'id="conflicts"' in page
    assert Conflicts.of(plain) is None and 'id="conflicts"' not in page_html({"run": plain})

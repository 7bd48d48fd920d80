"""The reach of results on the probed rows, and the number of rows that is needed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import xarray as xr
from models import build, samples

import geffect_fast as gf
from geffect_fast.measure.profiler import Profiler
from geffect_fast.report.html.page import page_html
from geffect_fast.report.tables.steps import render_steps
from geffect_fast.results.rows_needed import rows_note
from geffect_fast.steps.probe import Probe, run_identity
from geffect_fast.storage.step_store import StepStore


def result(low, high, *, n=6, there=40):
    """A result whose e_u of -1 has this interval, from n of the existing rows."""
    both = ("objective", "risk")
    return xr.Dataset(
        {
            "g_effect": (both, [[-1.0, 0.0]]),
            "g_effect_low": (both, [[low, 0.0]]),
            "g_effect_high": (both, [[high, 0.0]]),
        },
        coords={"objective": ["ga"], "risk": ["unlearn", "retain"], "step": 0},
        attrs={"n_forget": n} | ({} if there is None else {"forget_rows": there}),
    )


@pytest.mark.parametrize(
    ("off", "n", "there", "says"),
    [
        (0.4, 6, 40, "measure about 24 rows (--probe-rows 24)."),  # 6 * 2^2
        (0.3, 7, 40, "measure about 16 rows (--probe-rows 16)."),  # 7 * 2.25 = 15.75, rounded up
        (0.6, 6, 54, "it takes about 54 rows; measure all 54 (--probe-rows all)."),
        (
            0.6,
            6,
            40,
            "it takes about 54 rows, more than there are; measure all 40 (--probe-rows all).",
        ),
        (0.4, 6, 6, "it takes about 24 rows, and all 6 are measured."),
        (0.4, 6, None, "it takes about 24 rows, and all 6 are measured."),
    ],
)
def test_the_rows_that_it_takes_follow_from_the_width(off, n, there, says):
    found = rows_note(result(-1 - off, -1 + off / 2, n=n, there=there))
    assert found.endswith(f". To know it to within 20 %, {says}"), found
    assert f"the choice of {n} forget rows makes it uncertain by {100 * off:.0f} %" in found
    assert found.startswith("e_u at step 0 is -1 [")


@pytest.mark.parametrize(("off", "silent"), [(0.199, True), (0.201, False)])
def test_within_a_fifth_nothing_is_said(off, silent):
    assert (rows_note(result(-1 - off, -1 + off)) == "") == silent


def test_beyond_the_number_itself_and_of_one_row():
    assert "uncertain by more than itself" in rows_note(result(-2.5, 0.5))
    one = rows_note(result(math.nan, math.nan, n=1, there=12))
    assert one == (
        "No interval of e_u can be given from one forget row: measure all 12 (--probe-rows all)."
    )
    assert "measure 20 rows (--probe-rows 20)" in rows_note(result(math.nan, math.nan, n=1))
    assert rows_note(result(math.nan, math.nan, n=1, there=1)).endswith("row: give more.")
    assert rows_note(result(-2, 0).drop_vars("g_effect_low")) == ""


def test_a_training_says_it_in_its_result_its_tables_and_its_page():
    """The reference recomputes the interval of the probed rows from their effects."""
    model = build("llama", dtype=torch.float64)
    whole, retain = samples([9, 7, 11, 8, 6, 9, 12, 5], 1), samples([8, 10], 2)
    profiler = Profiler.of(
        model, None, forget=whole[:3], retain=retain, objectives=["ga"], resolve=("sample",)
    )
    store = StepStore(None, run_identity(profiler))
    probe = Probe(profiler, store, trained="ga", forget_rows=len(whole))
    for step in (0, 1):
        probe.measure_at(step, learning_rates=[0.1] * step)
    found = store.combined()
    first = found.isel(step=0).sel(objective="ga", risk="unlearn")
    e_u = float(first.g_effect.sum())
    off = float(max(first.g_effect_high - e_u, e_u - first.g_effect_low)) / abs(e_u)
    wanted = min(math.ceil(3 * (off / 0.2) ** 2), 8)
    assert off > 0.2 and wanted == 8  # three rows show no sign
    note = found.attrs["rows_note"]
    assert note.startswith("e_u at step 0 is") and "all 8 (--probe-rows all)" in note
    assert found.attrs["forget_rows"] == 8
    assert note in page_html({"run": found})
    assert note in [getattr(part, "plain", "") for part in render_steps(found).renderables]
    assert "rows_note" not in store.read(1).attrs


def test_all_rows_of_unlearn_need_no_more(tmp_path):
    """With enough similar rows the interval is narrow, and no message appears."""
    model = build("llama", dtype=torch.float64)
    rows = samples([9], 1) * 12
    found = gf.unlearn(
        model, None, forget=rows, retain=rows[:2], objective="ga", steps=1, learning_rate=1e-3,
        probe_rows="all", resolve=("sample",),
    )  # fmt: skip
    assert "rows_note" not in found.attrs and found.attrs["forget_rows"] == 12
    np.testing.assert_allclose(found.g_effect_low, found.g_effect_high, rtol=1e-6)

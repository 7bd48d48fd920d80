"""The metrics named in the table, in the guide and on the page on adding a metric."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

import geffect_fast as gf
from geffect_fast.errors import InputError
from geffect_fast.metrics import Metric, available, register
from geffect_fast.metrics.base import Need
from geffect_fast.metrics.registry import METRICS
from geffect_fast.report.summary.measures import measure_notes

NEEDS = get_args(Need)


def test_the_table_explains_what_it_shows(model, retrained, tokenizer, sets):
    def note(metrics, **more):
        given = {name: sets[name] for name in ("forget", "retain", "holdout")} | more
        return " ".join(measure_notes(gf.evaluate(model, tokenizer, **given, metrics=metrics)))

    plain = note("nll")
    assert "In brackets" in plain
    for word in ("AUC", "p-value:", "privleak", "No brackets"):
        assert word not in plain
    assert "AUC: the prob" in note("min_k")
    quality = note("forget_quality", retain_model=retrained)
    assert "p-value: 1 where" in quality
    assert "No brackets" in quality
    assert "In brackets" not in quality
    leak = note("privleak")
    assert "privleak: change" in leak
    assert "AUC: the prob" not in leak


PAGE = Path(__file__).parents[3] / "docs" / "adding_a_metric.md"


def test_the_metric_of_the_page_on_adding_one(model, tokenizer, rows):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    namespace: dict = {"__name__": "adding_a_metric"}
    try:
        exec(compile("\n".join(blocks), str(PAGE), "exec", dont_inherit=True), namespace)
        found = gf.evaluate(
            model,
            tokenizer,
            forget=rows[:3],
            retain=rows[3:5],
            metrics=["surprise(power=3)", namespace["Surprise"](), "nll"],
        )
        nll, plain, cubed = (
            found.sample_value.sel(metric=m) for m in ("nll", "surprise", "surprise(power=3.0)")
        )
        np.testing.assert_allclose(plain, nll**2)
        np.testing.assert_allclose(cubed, nll**3)
        with pytest.raises(InputError, match="taken by"):
            register("surprise")(type("Other", (Metric,), {"scores": lambda s, x: None}))
    finally:
        METRICS.classes.pop("surprise", None)
    with pytest.raises(InputError, match="must define scores"):
        register("nothing")(type("Nothing", (Metric,), {}))
    assert "nothing" not in available()


@pytest.mark.parametrize("name", NEEDS)
def test_the_page_names_every_need(name):
    assert f"`{name}`" in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", available())
def test_the_guide_names_every_metric(name):
    guide = (PAGE.parent / "guide/evaluate.md").read_text(encoding="utf-8")
    assert f"`{name}`" in guide

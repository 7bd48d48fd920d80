"""Every architecture of the table is exact for every parameter and sample, by the rules it names.

A row fails if it is not exact, or falls back to a slower rule or layout.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, FALCON_LAYOUT, PADDING
from models import FIVE, build, fp64_throughout, samples
from reference import effects_of_each, error

import geffect_fast as gf
from geffect_fast.capture import Plan
from geffect_fast.capture.generic_rule import GenericCall
from geffect_fast.results.groups import kind_of

ROOT = Path(__file__).resolve().parents[2]
FORGET, RETAIN = [2, 9, 6, 6], [5, 7]

OBJECTIVES = {
    "npo(beta=0.1) + kl": [(1.0, "npo", {"beta": 0.1}), (1.0, "kl", {})],
    "wga(alpha=1)": [(1.0, "wga", {"alpha": 1.0})],
}


def expected(name, forget, retain):
    """Effects of every objective by plain autograd, and the models."""
    model, other = build(name, torch.float64), build(name, torch.float64, seed=1)
    with fp64_throughout():
        every = effects_of_each(model, other, OBJECTIVES.values(), forget, retain, None)
    return every, model, other


@pytest.mark.parametrize(
    "name",
    [*FIVE, *(pytest.param(n, marks=pytest.mark.slow) for n in ARCHITECTURES if n not in FIVE)],
)
def test_effects_equal_one_sample_at_a_time(name):
    """The model's own loss is the risk, except for one architecture.

    This comparison is in fp64; `test_check_and_profile.py` has one in fp32.
    """
    forget, retain = samples(FORGET, 1, 2), samples(RETAIN, 2, 2)
    plain, model, other = expected(name, forget, retain)
    with fp64_throughout():
        result = gf.profile(
            model,
            None,
            forget=forget,
            retain=retain,
            objectives=list(OBJECTIVES),
            reference_model=other,
            token_budget=24,
        )
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert list(result.parameter.values) == trainable
    assert result.attrs["layout"] == ARCHITECTURES[name].layout
    assert result.attrs.get("own_loss") == ("auxiliary" if name == "olmoe" else None)
    served = Plan.of(model).learned.served
    assert served.keys() == set(trainable)
    generic = {kind_of(name) for name, rules in served.items() if GenericCall in rules}
    assert generic == set(ARCHITECTURES[name].generic)
    found = torch.from_numpy(result.g_effect.values)
    assert max(error(own, wanted) for own, wanted in zip(found, plain, strict=True)) <= 1e-10


def test_samples_hold_the_padding_token():
    ids = [row["input_ids"] for row in samples(FORGET, 1)]
    model = build("opt")
    assert model.get_input_embeddings().padding_idx == PADDING and any(PADDING in i for i in ids)


@pytest.mark.skipif(FALCON_LAYOUT != "packed", reason="the page is of transformers 5.24 and later")
def test_the_page_of_models_has_the_same_rows():
    page = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    layouts = "packed|equal_length|single"
    forward = r"yes|not past `\w+`"
    pattern = rf"^\| (\w+) \| (\w+) \| ({layouts}) \| (.*?) \| ({forward}) \| [^|]+ \|$"
    rows = re.findall(pattern, page, re.MULTILINE)
    found = {
        row: (*cells, set(re.findall(r"`(.+?)`", kinds)), passed)
        for row, *cells, kinds, passed in rows
    }
    assert len(found) == len(rows)
    assert found == {
        name: (
            row.config,
            row.layout,
            set(row.generic),
            f"not past `{row.forward}`" if row.forward else "yes",
        )
        for name, row in ARCHITECTURES.items()
    }
    assert f"\n{len(ARCHITECTURES)} architectures;" in page
    for file, test in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?", page):
        assert f"def {test}" in (ROOT / file).read_text(encoding="utf-8")
    assert f"for {len(ARCHITECTURES)} architectures" in (ROOT / "README.md").read_text("utf-8")

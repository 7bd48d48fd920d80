"""A model that knows its rows, and two that have unlearned some of them."""

from __future__ import annotations

import copy
import json

import pytest
from control_models import ASKED, FORGET, RETAIN, ROWS, adapter_on
from memorised import blank_model, fitted, tokenizer_of

import geffect_fast as gf
from geffect_fast.data import write_jsonl
from geffect_fast.demo import save
from geffect_fast.measure.models import load_model


@pytest.fixture(scope="session")
def tokenizer():
    return tokenizer_of(ROWS)


@pytest.fixture(scope="session")
def original(tokenizer):
    """A model that knows the rows."""
    return fitted(blank_model(tokenizer), tokenizer, [*FORGET, *RETAIN], 300)


@pytest.fixture(scope="session")
def unlearned(original, tokenizer):
    """A model after ascent on the forget rows, which costs the other rows too."""
    return fitted(copy.deepcopy(original), tokenizer, FORGET, 12, sign=-1.0, lr=1e-2)


@pytest.fixture(scope="session")
def gentler(original, tokenizer):
    return fitted(copy.deepcopy(original), tokenizer, FORGET, 8, sign=-1.0, lr=6e-3)


@pytest.fixture(scope="module")
def result(original, unlearned, gentler, tokenizer):
    return gf.control(
        original,
        {"ascent": unlearned, "gentler": gentler},
        tokenizer,
        **ASKED,
    )


@pytest.fixture(scope="session")
def study(tmp_path_factory, original, unlearned, gentler, tokenizer):
    folder = tmp_path_factory.mktemp("control")
    for name, model in (("original", original), ("ascent", unlearned), ("gentler", gentler)):
        save(model, tokenizer, folder / name)
    write_jsonl(FORGET, folder / "forget.jsonl")
    write_jsonl(RETAIN, folder / "retain.jsonl")
    adapter = adapter_on(load_model(folder / "original"))
    adapter.base_model.model.config._name_or_path = str(folder / "original")
    adapter.peft_config["default"].base_model_name_or_path = str(folder / "original")
    adapter.save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def here(here):
    file = here / "adapter/adapter_config.json"
    changed = {"base_model_name_or_path": str(here / "original")}
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    return here

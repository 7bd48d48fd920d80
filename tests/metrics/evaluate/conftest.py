"""Two models that know rows of their own, and the measures of one."""

from __future__ import annotations

import warnings

import pytest
from evaluated import full_rows, without
from memorised import blank_model, fitted

import geffect_fast as gf
from geffect_fast.demo import train_tokenizer
from geffect_fast.errors import GEffectWarning
from geffect_fast.metrics import available


@pytest.fixture(scope="session")
def rows():
    return full_rows()


@pytest.fixture(scope="session")
def tokenizer(rows):
    texts = [f"{row['question']} {row['answer']}" for row in rows]
    return train_tokenizer([*texts, "A. B. C. D. Indeed: Tell me."], 320)


@pytest.fixture(scope="session")
def model(tokenizer):
    """A model that knows some rows, after a few steps on the first of them."""
    return fitted(blank_model(tokenizer, 1), tokenizer, full_rows()[:8], 60)


@pytest.fixture(scope="session")
def retrained(tokenizer):
    return fitted(blank_model(tokenizer, 2), tokenizer, full_rows()[8:16], 60)


@pytest.fixture(scope="session")
def sets(rows):
    return {
        "forget": rows[:8],
        "retain": rows[8:16],
        "holdout": without(rows[16:22], "perturbed_answer", "paraphrased_answer"),
        "probes": {
            "real_authors": without(rows[22:26], "paraphrased_answer"),
            "world_facts": without(rows[24:29], "paraphrased_answer"),
        },
    }


@pytest.fixture(scope="module")
def result(model, tokenizer, retrained, sets):
    with warnings.catch_warnings():
        warnings.simplefilter("error", GEffectWarning)
        warnings.filterwarnings(
            "ignore", "metric verbatim_memorisation reads beginnings and continuations"
        )
        return gf.evaluate(
            model,
            tokenizer,
            **sets,
            reference_model=retrained,
            retain_model=retrained,
            metrics=list(available()),
            max_new_tokens=12,
        )

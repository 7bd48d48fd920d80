"""Positions are the model's own: a risk is the loss that the model itself gives, row by row."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import ARCHITECTURES, SMALL, VOCAB, Architecture
from models import FIVE, build, fp64_throughout, samples
from reference import close, effects
from small_models import IgnoresPositions, Logits, ready

import geffect_fast as gf
from geffect_fast.errors import UnsupportedModelError

ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "is_decoder": True,
}
KIN = {
    name: Architecture(name, ENCODER, "equal_length")
    for name in (
        *("Roberta", "XLMRoberta", "XLMRobertaXL", "Camembert", "RobertaPreLayerNorm"),
        "Data2VecText",
    )
}
"""Models that count positions from `padding_idx + 1`, leaving out padding."""
KIN["Xmod"] = Architecture("Xmod", ENCODER | {"languages": ["x"], "default_language": "x"})
SAME_KIND = {
    name: Architecture(name, ENCODER)
    for name in ("Bert", "BertGeneration", "BigBird", "BioGpt", "Electra", "Ernie", "MegatronBert",
                 "RemBert", "RoFormer")
}  # fmt: skip
COUNTED_BY_THEMSELVES = KIN | SAME_KIND

LENGTHS = [5, 9, 5]
PADDING = 1  # RoBERTa's padding token; a tokeniser may put it into a sample


def loss_by_itself(model, rows):
    """The model's own loss over all rows, as one mean over tokens."""
    total = n = 0
    with torch.no_grad():
        for row in rows:
            ids, labels = (torch.tensor([row[k]]) for k in ("input_ids", "labels"))
            counts = int((labels[0, 1:] != -100).sum())
            settings = {"output_router_logits": False} if _has_routers(model) else {}
            total += counts * float(model(input_ids=ids, labels=labels, **settings).loss)
            n += counts
    return total / n


def _has_routers(model):
    """Whether a model has routers, whose term in the loss is no risk of the data."""
    return getattr(model.config, "output_router_logits", False)


def profiled(model, rows, **settings):
    return gf.profile(
        model, None, forget=rows, retain=rows[:2], objectives=["ga"], **settings
    )  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        *COUNTED_BY_THEMSELVES,
        *(n for n, row in ARCHITECTURES.items() if n in FIVE or row.layout != "packed"),
    ],
)
def test_a_risk_is_the_model_s_own_loss(name):
    """The risk equals the model's own loss.

    `measure/test_architectures.py` compares the effects of all architectures, and their loss.
    """
    rows = samples(LENGTHS, 1)
    if name in KIN:
        rows[1]["input_ids"][3] = PADDING
    with fp64_throughout():
        model = build((ARCHITECTURES | COUNTED_BY_THEMSELVES)[name], torch.float64)
        found = profiled(model, rows, engine="reverse")
        assert float(found.risk_value[0]) == pytest.approx(loss_by_itself(model, rows), rel=1e-12)


@pytest.mark.parametrize("name", KIN)
def test_effects_and_check_are_of_the_same_function(name):
    rows = samples(LENGTHS, 1)
    with fp64_throughout():
        model = build(KIN[name], torch.float64)
        expected = effects(model, model, [(1.0, "ga", {})], rows, rows[:2], None)
        for engine in ("reverse", "forward"):
            found = profiled(model, rows, engine=engine, resolve=["sample"])
            close(found.g_effect[0].values, expected[:, :, : len(rows)].sum(1), 1e-10)
            assert found.attrs["layout"] == "equal_length"
        checked = gf.check(model, None, data=rows)
        assert checked.exact and checked.layout == "equal_length"


def test_a_reference_that_counts_otherwise_is_not_packed():
    rows = samples(LENGTHS, 1)
    settings = {"forget": rows, "retain": rows, "objectives": ["npo"]}
    model, other = build("llama"), ready(IgnoresPositions, torch.float32)
    with pytest.raises(UnsupportedModelError, match="reference_model: IgnoresPositions does not"):
        gf.profile(model, None, reference_model=other, **settings)
    with pytest.raises(UnsupportedModelError, match="reference_model: IgnoresPositions does not"):
        gf.check(model, None, data=rows, objectives=["npo"], reference_model=other)
    gf.profile(Logits(model), None, reference_model=other, **settings)  # neither batch is packed


# ---- frequencies that follow the longest sequence ----

TRAINED_ON = 16
GROWING = {
    "dynamic": ("Llama", {"rope_type": "dynamic", "factor": 4.0}),
    "longrope": (
        "Phi3",
        {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.2],
            "long_factor": [2.0, 3.0],
            "original_max_position_embeddings": TRAINED_ON,
            "factor": 4.0,
        },
    ),
}
DATA = {"short": [5, 9, 16], "long": [20, 20, 24], "both": [5, 9, 40, 24]}


def growing(kind, dtype=torch.float64):
    config, rotary = GROWING[kind]
    rotary = copy.deepcopy(rotary) | {"rope_theta": 100.0}
    settings = SMALL | {"max_position_embeddings": TRAINED_ON, "rope_parameters": rotary}
    if config == "Phi3":
        settings["original_max_position_embeddings"] = TRAINED_ON
    return build(Architecture(config, settings), dtype)


@pytest.mark.parametrize(
    ("lengths", "engine"), [*((name, "reverse") for name in DATA), ("both", "forward")]
)
@pytest.mark.parametrize("kind", GROWING)
def test_a_sample_s_frequencies_are_its_own(kind, lengths, engine):
    """The loss of each row is that of a new model, whatever rows are beside it or ran before."""
    rows = samples(DATA[lengths], 1)
    with fp64_throughout():
        model = growing(kind)
        found = profiled(model, rows, engine=engine, resolve=["sample"])
        new = [loss_by_itself(growing(kind), [row]) * (len(row["input_ids"]) - 1) for row in rows]
        own = sum(new) / sum(len(row["input_ids"]) - 1 for row in rows)
    assert float(found.risk_value[0]) == pytest.approx(own, rel=1e-12)
    assert found.attrs["layout"] == ("packed" if lengths == "short" else "equal_length")


@pytest.mark.parametrize("kind", GROWING)
def test_check_follows_the_same_rule(kind):
    rows = samples(DATA["both"], 1)
    checked = gf.check(growing(kind), None, data=rows)
    assert checked.exact and checked.layout == "equal_length"


def test_what_longer_probes_need_decides_too():
    rows = samples(DATA["short"], 1)
    probe = samples([40], 3)
    with fp64_throughout():
        model = growing("longrope")
        found = profiled(model, rows, probes={"other": probe})
        assert float(found.risk_value[2]) == pytest.approx(loss_by_itself(model, probe), rel=1e-12)


def test_frequencies_of_before_are_there_again():
    model = growing("dynamic")
    rotary = model.model.rotary_emb
    long = torch.tensor([samples([40], 1)[0]["input_ids"]])
    before = model(input_ids=long).logits
    grown = rotary.inv_freq
    profiled(model, samples(DATA["both"], 1))
    assert rotary.inv_freq is grown and int(rotary.max_seq_len_cached) == 40
    assert torch.equal(model(input_ids=long).logits, before)


@pytest.mark.parametrize("kind", GROWING)
def test_pairs_of_several_lengths_are_refused(kind):
    forget, other = samples([20, 9], 1), samples([24, 9], 2)
    rows = [row | {"alternative": a} for row, a in zip(forget, other, strict=True)]
    refused = r"forget.*: its answer and alternatives have 20 to 24 tokens, and beyond 16 "
    with pytest.raises(UnsupportedModelError, match=refused):
        gf.profile(growing(kind), None, forget=rows, retain=forget, objectives=["dpo"])
    with pytest.raises(UnsupportedModelError, match="its answer and alternatives have 20 to 24"):
        gf.check(growing(kind), None, data=rows, objectives=["dpo"])
    gf.profile(growing(kind), None, forget=rows[1:], retain=forget, objectives=["dpo"])


# ---- models that differ only on more tokens than a trial has ----


def test_attention_in_chunks_of_a_row_is_not_packed():
    """A chunk begins at a place of the packed row, not where a sample begins."""
    settings = SMALL | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 1}
    settings |= {"intermediate_size_mlp": 24, "attention_chunk_size": 32, "moe_layers": []}
    rows = samples([20, 20, 20], 1)
    with fp64_throughout():
        model = build(Architecture("Llama4Text", settings), torch.float64)
        found = profiled(model, rows, token_budget=100)
        assert float(found.risk_value[0]) == pytest.approx(loss_by_itself(model, rows), rel=1e-12)


class Stretched(Logits):
    """A model that counts from 0 by `position_ids`, in smaller steps if any position is large."""

    def forward(self, input_ids, position_ids=None):
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        step = 2 if int(position_ids.max()) >= 8 else 1
        return self.model(input_ids=input_ids, position_ids=position_ids // step, use_cache=False)


def test_a_model_that_counts_otherwise_beside_a_long_sample_is_not_packed():
    with fp64_throughout():
        model = Stretched(build("gpt2", torch.float64))
        rows = samples([5, 12, 6], 1)
        result = profiled(model, rows)
        expected = effects(model, model, [(1.0, "ga", {})], rows, rows[:2], None)
        close(result.g_effect[0].values, expected[..., : len(rows)], 1e-10)
    assert result.attrs["layout"] == "equal_length"
    assert profiled(model, samples([5, 6, 8], 1)).attrs["layout"] == "packed"

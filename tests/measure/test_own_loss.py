"""A model's own loss is the risk, or the output names the difference."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
from architectures import VOCAB
from engines.small_models import Routed, ready
from models import build, samples
from report_views import text_of

import geffect_fast as gf
from geffect_fast.capture import Plan
from geffect_fast.capture.attribution import ANY
from geffect_fast.data.tokenize import tokenize_rows
from geffect_fast.engines.known_models import choose_layout, own_loss
from geffect_fast.errors import GEffectWarning, UnsupportedModelError
from geffect_fast.report.format import notes
from geffect_fast.report.tables.check import render_check

ROWS = samples([7, 9, 6], 1)

IDS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BART = IDS | {
    "d_model": 16, "decoder_layers": 1, "decoder_ffn_dim": 24, "decoder_attention_heads": 2,
    "encoder_layers": 1, "encoder_ffn_dim": 24, "encoder_attention_heads": 2,
    "max_position_embeddings": 64, "decoder_start_token_id": 1,
    "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
}  # fmt: skip
XLM = IDS | {
    "emb_dim": 16, "n_layers": 1, "n_heads": 2, "n_langs": 1, "max_position_embeddings": 64,
    "dropout": 0.0, "attention_dropout": 0.0, "n_words": VOCAB, "pad_index": 0,
}  # fmt: skip
PEGASUS = BART | {"attention_type": "original_full"}
UNSHIFTED = {
    "BartForCausalLM": ("Bart", BART),
    "BigBirdPegasusForCausalLM": ("BigBirdPegasus", PEGASUS),
    "BlenderbotForCausalLM": ("Blenderbot", BART),
    "BlenderbotSmallForCausalLM": ("BlenderbotSmall", BART),
    "MBartForCausalLM": ("MBart", BART),
    "MarianForCausalLM": ("Marian", BART),
    "MvpForCausalLM": ("Mvp", BART),
    "PLBartForCausalLM": ("PLBart", BART),
    "PegasusForCausalLM": ("Pegasus", BART),
    "TrOCRForCausalLM": ("TrOCR", BART),
    "WhisperForCausalLM": ("Whisper", BART | {"max_target_positions": 64}),
    "CpmAntForCausalLM": (
        "CpmAnt",
        {"vocab_size": VOCAB, "hidden_size": 16, "num_attention_heads": 2, "dim_head": 8,
         "dim_ff": 24, "num_hidden_layers": 1, "prompt_length": 2, "prompt_types": 4,
         "segment_types": 4},
    ),
    "XLNetLMHeadModel": (
        "XLNet", IDS | {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24, "dropout": 0.0}
    ),
    "XLMWithLMHeadModel": ("XLM", XLM),
    "FlaubertWithLMHeadModel": ("Flaubert", XLM),
    "ProphetNetForCausalLM": (
        "ProphetNet",
        IDS | {"hidden_size": 16, "num_decoder_layers": 1, "decoder_ffn_dim": 24,
               "num_decoder_attention_heads": 2, "num_encoder_layers": 1, "encoder_ffn_dim": 24,
               "num_encoder_attention_heads": 2, "max_position_embeddings": 64, "ngram": 2,
               "num_buckets": 4, "relative_max_distance": 16, "dropout": 0.0,
               "attention_dropout": 0.0, "activation_dropout": 0.0},
    ),
}  # fmt: skip


def unshifted(name):
    config, settings = UNSHIFTED[name]
    made = getattr(transformers, f"{config}Config")(**settings, is_decoder=True)
    return build(lambda: getattr(transformers, name)(made))


def by_itself(model, row, move=0):
    """The model's own loss of one row, with its labels moved to the left by the caller."""
    ids = torch.tensor([row["input_ids"]])
    labels = torch.cat([ids[:, move:], ids.new_full((1, move), -100)], 1)
    with torch.no_grad():
        return float(model(input_ids=ids, labels=labels).loss)


def warned(model, rows=ROWS):
    """A profile and its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = gf.profile(model, None, forget=rows, retain=rows[:1], objectives=["ga"])
    return found, [str(w.message) for w in caught if w.category is GEffectWarning]


def printed(model, rows=ROWS):
    """The printed text of `check`."""
    return text_of(render_check(gf.check(model, None, data=rows, samples=2)), 1000)


def predicted_before(model, rows=ROWS):
    """The loss over all rows as one mean over tokens, with labels that the caller moved."""
    counts = [len(row["input_ids"]) - 1 for row in rows]
    losses = [by_itself(model, row, 1) for row in rows]
    return sum(n * loss for n, loss in zip(counts, losses, strict=True)) / sum(counts)


@pytest.mark.parametrize("name", UNSHIFTED)
def test_labels_at_their_own_places_are_said_to_be(name):
    model = unshifted(name)
    found, said = warned(model)
    own = by_itself(model, ROWS[0])
    if name == "ProphetNetForCausalLM":  # a mean over two streams, one of them a place further on
        assert found.attrs["own_loss"] == "other" and "a term, a scale" in said[0]
    else:
        assert found.attrs["own_loss"] == "unshifted"
        own -= by_itself(model, ROWS[0], 1)
        assert found.attrs["own_loss_difference"] == pytest.approx(own, abs=1e-5)
        assert float(found.risk_value[0]) == pytest.approx(predicted_before(model), rel=1e-5)
        assert "does not shift labels" in said[0]
    assert len(said) == 1 and "\n" not in said[0]
    assert found.attrs["own_loss_note"] in said[0]
    if name in ("BartForCausalLM", "ProphetNetForCausalLM"):  # one architecture of each kind
        assert f"Model: {found.attrs['own_loss_note']}." in printed(model)


@pytest.mark.parametrize("name", ["llama", "mamba", "olmoe"])
def test_short_forwards_find_the_own_loss(name):
    """One finds that it is the risk unless this is known; a second one measures the difference.

    `test_architectures.py` compares the own loss of every architecture.
    """
    model = build(name)
    runs = []
    model.register_forward_pre_hook(
        lambda *call: runs.append(call[-1]["input_ids"].numel()), with_kwargs=True
    )
    plan = Plan.of(model)
    sample_set = tokenize_rows(ROWS, None, name="forget")
    choose_layout(plan, sample_set)
    known = ANY in plan.shown
    runs.clear()
    found = own_loss(plan, sample_set)
    if name == "olmoe":
        assert found.kind == "auxiliary" and found.difference > 0.01 and runs == [7, 7]
        assert "an auxiliary loss" in str(found)
    else:
        assert found is None and runs == ([] if known else [7])


class WithLoss(Routed):
    """A model that gives a loss of its own where it is given labels."""

    def __init__(self, own):
        super().__init__()
        self.own = own

    def forward(self, input_ids, position_ids=None, labels=None):
        answer = super().forward(input_ids)
        if labels is not None:
            self.own(answer, labels)
        return answer


def shifted(answer, labels, **settings):
    return F.cross_entropy(answer.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), **settings)


def smoothed(answer, labels):
    answer.loss = shifted(answer, labels, label_smoothing=0.1)


def scaled(answer, labels):
    answer.loss = 2 * shifted(answer, labels)


def with_routers(answer, labels):
    answer.aux_loss = torch.tensor(0.25)
    answer.loss = shifted(answer, labels) + answer.aux_loss


def plain(answer, labels):
    answer.loss = shifted(answer, labels)


def none_at_all(answer, labels):
    answer.loss = None


def by_token(answer, labels):
    answer.loss = shifted(answer, labels, reduction="none")


def refused_labels(answer, labels):
    raise KeyError("labels_of_classes")


def other_logits(answer, labels):
    answer.logits = answer.logits.flip(1)
    answer.loss = shifted(answer, labels) + 1


OTHERS = {
    smoothed: ("other", None),
    scaled: ("other", None),
    with_routers: ("auxiliary", 0.25),
    plain: None,
    none_at_all: None,
    by_token: None,
    refused_labels: None,
}


@pytest.mark.parametrize("own", OTHERS, ids=lambda own: own.__name__)
def test_a_loss_of_its_own_is_named_with_its_value(own):
    model = ready(lambda: WithLoss(own), torch.float32)
    rows = samples([7, 7], 1)
    found, said = warned(model, rows)
    if OTHERS[own] is None:
        assert not said and "own_loss" not in found.attrs and "own loss" not in printed(model, rows)
        return
    kind, by = OTHERS[own]
    if by is None:
        by = by_itself(model, rows[0]) - float(
            shifted(
                model(torch.tensor([rows[0]["input_ids"]])), torch.tensor([rows[0]["input_ids"]])
            )
        )
    assert found.attrs["own_loss"] == kind
    assert found.attrs["own_loss_difference"] == pytest.approx(by, rel=1e-4)
    (line,) = said
    assert f"sequence: {found.attrs['own_loss_difference']:+.4g})" in line
    assert f"Model: {found.attrs['own_loss_note']}." in printed(model, rows)


def test_other_logits_beside_labels_are_refused():
    model = ready(lambda: WithLoss(other_logits), torch.float32)
    refused = "WithLoss: it computes other logits where it is given labels"
    for run in (warned, printed):
        with pytest.raises(UnsupportedModelError, match=refused):
            run(model)


def test_a_loss_that_the_user_sets_is_looked_at():
    """Models known by their code are known with transformers' own loss alone."""
    model = build("llama")
    model.loss_function = lambda logits, labels, **_: (
        3 * F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    )
    found, (line,) = warned(model)
    assert found.attrs["own_loss"] == "other" and "difference on a short sequence" in line
    assert not warned(build("llama"))[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_precisions(dtype):
    bart = unshifted("BartForCausalLM").to(dtype)
    assert warned(bart)[0].attrs["own_loss"] == "unshifted"
    for name in ("bloom", "mixtral"):
        assert "own_loss" not in warned(build(name, dtype))[0].attrs


def test_a_run_tells_of_it_in_its_tables():
    found, _ = warned(build("olmoe"))
    assert found.attrs["own_loss_note"] in " ".join(notes(found.attrs))

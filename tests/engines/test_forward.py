"""The forward engine against differences of losses, and against plain autograd token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES
from engines.forward_cases import (
    ALTERNATIVES,
    FORGET,
    OBJECTIVES,
    RETAIN,
    close,
    run,
)
from models import build, fp64_throughout
from reference import (
    forget_shares,
    labelled_states,
    n_labelled,
    n_targets,
    retain_shares,
    risk_gradients,
    target_logits,
    token_logprobs,
)
from torch.overrides import TorchFunctionMode

from geffect_fast.errors import InputError
from geffect_fast.objectives import Objective

# ---- against differences of the loss itself ----


class HeldConstant(TorchFunctionMode):
    """A store of detached numbers, as they were at the first evaluation.

    A derivative holds detached numbers constant, so finite differences must do so too.
    """

    def __init__(self):
        super().__init__()
        self.kept, self.at = [], None

    def again(self):
        self.at = 0
        return self

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is not torch.Tensor.detach:
            return out
        if self.at is None:
            self.kept.append(out.clone())
            return out
        self.at += 1
        return self.kept[self.at - 1]


def shares(objective, model, other):
    """Every row's share of an objective, `(n_samples,)`, by the published formula."""
    out = torch.zeros(len(FORGET) + len(RETAIN), dtype=torch.float64)
    for coefficient, name, params in objective:
        if name in ("nll", "kl", "rr"):
            own, at = retain_shares(name, params, model, other, RETAIN, "token"), len(FORGET)
        else:
            at = 0
            own = forget_shares(name, params, model, other, FORGET, ALTERNATIVES, "token")
        for i, share in enumerate(own):
            out[at + i] += coefficient * share
    return out


def differences(function, model, direction, step):
    """`d/d eps function` at `theta + eps V`, by central differences of fourth order."""
    parameters = list(model.parameters())
    values = {}
    for k in (-2, -1, 1, 2):
        for p, v in zip(parameters, direction, strict=True):
            p += k * step * v
        values[k] = function()
        for p, v in zip(parameters, direction, strict=True):
            p -= k * step * v
    return (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * step)


@pytest.mark.slow
@torch.no_grad()
def test_equals_differences_of_the_published_loss(exact):
    """The reference takes no derivative: it evaluates the loss a little ahead and a little back."""
    _, other, risks, result = exact
    model = build("llama_tied", torch.float64)
    with fp64_throughout():
        for name, objective in OBJECTIVES.items():
            held = HeldConstant()
            with held:
                shares(objective, model, other)

            def moved(objective=objective, held=held):
                with held.again():
                    return shares(objective, model, other)

            for m, risk in enumerate(risks):
                step = 2e-4 / float(sum(v.square().sum() for v in risk).sqrt())
                expected = differences(moved, model, risk, step)
                found = result.g_effect.sel(objective=name)[m].sum("token")
                close(found, expected.numpy(), 1e-8)


# ---- token by token ----


def terms_of(kind, params, model, other, row, i):
    """An objective's summands on one forget row, as `(sequence, position of the token, summand)`.

    The weights are written out; they hold everything but the one term constant.
    """
    labels = torch.tensor(row["labels"])
    predicted = [t for t in range(1, len(labels)) if labels[t] != -100]
    n = n_targets(FORGET)
    with torch.no_grad():
        frozen = token_logprobs(other, row)
    if kind == "rmu":
        states = labelled_states(model, row, params["layer"])
        u = torch.rand(states.shape[1], generator=torch.Generator().manual_seed(params["seed"]))
        u = u.to(states)
        places = [t for t in range(len(labels)) if labels[t] != -100]
        for t, h in zip(places, states, strict=True):
            yield 0, t, (h - params["c"] * u).square().mean() / n_labelled(FORGET)
        return
    if kind == "undial":
        logits, targets = target_logits(model, row)
        with torch.no_grad():
            low = target_logits(other, row)[0]
            low[torch.arange(len(targets)), targets] -= params["beta"]
        for t, z, q in zip(predicted, logits, low.softmax(-1), strict=True):
            yield 0, t, -(q * z.log_softmax(-1)).sum() / n
        return
    logp = token_logprobs(model, row)
    ratio = (logp - frozen).detach().sum()
    if kind == "npo":
        weight = torch.full_like(frozen, 2 / len(FORGET) * torch.sigmoid(params["beta"] * ratio))
    elif kind == "wga":
        weight = logp.detach().exp() ** params["alpha"] / n
    else:
        weight = torch.zeros_like(frozen)
    for q, alternative in enumerate(ALTERNATIVES[i] if kind in ("po", "dpo") else [], start=1):
        own = token_logprobs(model, alternative)
        if kind == "po":
            every = [a for several in ALTERNATIVES for a in several]
            up = torch.tensor(1 / n_targets(every))
        else:
            with torch.no_grad():
                win = (own - token_logprobs(other, alternative)).sum()
            share = 1 / len(FORGET) / len(ALTERNATIVES[i])
            up = 2 * share * torch.sigmoid(-params["beta"] * (win - ratio))
            weight = weight + up
        places = [t for t in range(1, len(alternative["labels"])) if alternative["labels"][t] >= 0]
        for t, one in zip(places, own, strict=True):
            yield q, t, -up * one
    if kind != "po":
        for t, w, one in zip(predicted, weight, logp, strict=True):
            yield 0, t, w * one


def products(term, model, risks):
    """`<grad term, V_m>` for every risk."""
    grads = torch.autograd.grad(
        term, list(model.parameters()), retain_graph=True, materialize_grads=True
    )
    return [sum(float((g * v).sum()) for g, v in zip(grads, risk, strict=True)) for risk in risks]


def token_of(row, i, sequence, position):
    """A token's place among a sample's labelled ones: the answer's, then the alternatives'."""
    several = [row, *ALTERNATIVES[i]]
    labelled = [
        (q, t)
        for q, one in enumerate(several)
        for t, label in enumerate(one["labels"])
        if label != -100
    ]
    return labelled.index((sequence, position))


KINDS = {
    "wga(alpha=1.5)": ("wga", {"alpha": 1.5}),
    "npo(beta=0.5)": ("npo", {"beta": 0.5}),
    "po": ("po", {}),
    "dpo(beta=0.5)": ("dpo", {"beta": 0.5}),
    "undial(beta=2)": ("undial", {"beta": 2.0}),
    "rmu(layer=1, c=3)": ("rmu", {"layer": 1, "c": 3.0, "seed": 0}),
}


@pytest.mark.parametrize("name", ["llama_tied", "falcon_alibi", "qwen3_next"])
def test_every_token_is_plain_autograd_of_its_own_term(name):
    """In every layout, the effect of a term stands at the token that the term is about."""
    with fp64_throughout():
        model, other = build(name, torch.float64), build(name, torch.float64, seed=1)
        found = run(model, other, KINDS)
        assert found.attrs["layout"] == ARCHITECTURES[name].layout
        risks = risk_gradients(model, FORGET, RETAIN)
        expected = np.zeros(found.g_effect.shape)
        for k, (kind, params) in enumerate(KINDS.values()):
            for i, row in enumerate(FORGET):
                for q, t, term in terms_of(kind, params, model, other, row, i):
                    expected[k, :, i, token_of(row, i, q, t)] += products(term, model, risks)
        for k in range(len(KINDS)):
            close(found.g_effect[k], expected[k])


def test_retain_rows_have_tokens_of_their_own(exact):
    """kl and rr have effects by retain row, told apart by `set`; plain autograd gives the same."""
    model, other, risks, result = exact
    with fp64_throughout():
        found = run(model, other, ["kl", "rr(layer=2)"], token_budget=7)
        for i, row in enumerate(RETAIN):
            logits, q = target_logits(model, row)[0], target_logits(other, row)[0].detach()
            kl = (q.softmax(-1) * (q.log_softmax(-1) - logits.log_softmax(-1))).sum(-1)
            h, frozen = labelled_states(model, row, 2), labelled_states(other, row, 2).detach()
            rr = (h - frozen).square().mean(-1) / n_labelled(RETAIN)
            first = i == 0  # the first token has a label that nothing predicts
            for k, terms in enumerate((kl / n_targets(RETAIN), rr)):
                for t, term in enumerate(terms):
                    at = t + 1 if first and k == 0 else t
                    effects = found.g_effect[k, :, len(FORGET) + i, at]
                    np.testing.assert_allclose(
                        effects, products(term, model, risks), rtol=1e-9, atol=1e-13
                    )
    assert list(found.set.values) == ["forget"] * len(FORGET) + ["retain"] * len(RETAIN)
    assert not found.g_effect[:, :, : len(FORGET)].values.any()
    both = result.g_effect.sel(objective="rmu_mask(layer=2) + rr(layer=2)")
    close(both[:, len(FORGET) :, :7], found.g_effect[1][:, len(FORGET) :])


def test_coordinates_of_tokens(exact):
    """The axis holds the answer's labelled tokens, then the alternatives', then padding."""
    result = exact[3]
    for i, row in enumerate(FORGET):
        several = [row, *row["alternative"]]
        ids = [label for one in several for label in one["labels"] if label != -100]
        numbers = [q for q, one in enumerate(several) for label in one["labels"] if label != -100]
        end = [-1] * (result.sizes["token"] - len(ids))
        assert result.token_id[i].values.tolist() == ids + end
        assert result.sequence[i].values.tolist() == numbers + end
        assert not result.g_effect[:, :, i, len(ids) :].values.any()
    assert result.token_id[len(FORGET), :6].values.tolist() == RETAIN[0]["input_ids"]
    # Nothing predicts a label on a first token, but its hidden state exists.
    first = result.g_effect[:, :, 0, 0]
    of_states = [name for name in OBJECTIVES if name.startswith("rmu")]
    assert first.sel(objective=of_states).values.all()
    others = [name for name in OBJECTIVES if name not in of_states]
    assert not first.sel(objective=others).values.any()


# ---- objectives of users ----


@dataclass(frozen=True)
class Everywhere(Objective):
    """An objective with a term at every position, also where nothing is predicted."""

    needs: ClassVar = frozenset({"hidden_states"})

    def loss(self, outputs, batch, reference):
        return self.token_terms(outputs, batch, reference).sum()

    def token_terms(self, outputs, batch, reference):
        return outputs.hidden_states[1].square().sum(-1)


def test_a_term_of_no_token_is_refused_by_token_only():
    model = build("llama")
    message = "objective Everywhere: token_terms has a term at a position that predicts no label"
    with pytest.raises(InputError, match=f"^{message}.*resolve without 'token'"):
        run(model, objectives=[Everywhere()])
    settings = {"resolve": ["sample"], "norms": False}
    found = run(model, objectives=[Everywhere()], **settings)
    expected = run(model, objectives=[Everywhere()], engine="reverse", **settings)
    close(found.g_effect, expected.g_effect, 1e-5)

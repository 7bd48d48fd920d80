"""Derivatives of token terms in the forward engine, against reverse mode.

Numbers that an objective holds constant have no derivative.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from models import build, fp64_throughout, samples
from test_objective_formulas import CASES

import geffect_fast as gf
from geffect_fast.engines.objective_tangents import term_tangents, terms_disagree
from geffect_fast.errors import InputError
from geffect_fast.objectives import KL, UNDIAL, WGA, Objective, Outputs, SatImp, SimNPO


def noise(outputs, seed):
    generator = torch.Generator().manual_seed(seed)
    every = tuple(torch.randn(x.shape, generator=generator).to(x) for x in outputs.tensors())
    return Outputs.of(every, outputs.logits is not None)


def leaves(outputs):
    """The outputs as leaves that do not depend on each other."""
    own = tuple(x.detach().requires_grad_() for x in outputs.tensors())
    return Outputs.of(own, outputs.logits is not None)


def slope(objective, case, outputs, tangents, by=None):
    """`<d (by . terms) / d outputs, tangents>` by plain autograd, `by` 1 where not given."""
    terms = objective.token_terms(outputs, case.batch, case.reference)
    by = torch.ones_like(terms) if by is None else by
    grads = torch.autograd.grad(
        (by * terms).sum(), outputs.tensors(), allow_unused=True, materialize_grads=True
    )
    return sum(float((g * v).sum()) for g, v in zip(grads, tangents.tensors(), strict=True))


@pytest.mark.parametrize("reduction", ["token", "sample", "sum"])
@pytest.mark.parametrize("o", CASES, ids=str)
def test_terms_move_as_reverse_mode_says(o, reduction, make_data):
    """Along directions of noise in all outputs at once, one term at a time and all together."""
    case = make_data(("answer", "alternative"), seed=3).case(reduction)
    outputs = leaves(case.outputs)
    along = [noise(outputs, seed) for seed in (1, 2)]
    found = term_tangents(o, outputs, case.batch, case.reference, along)
    assert found.shape == (2, case.batch.total_tokens) and found.dtype == torch.float64
    assert not found.requires_grad and found.any()
    for tangents, terms in zip(along, found, strict=True):
        assert float(terms.sum()) == pytest.approx(slope(o, case, outputs, tangents), rel=1e-10)
        for t in range(0, len(terms), 5):
            one = torch.zeros_like(terms)
            one[t] = 1
            assert float(terms[t]) == pytest.approx(
                slope(o, case, outputs, tangents, one), rel=1e-10, abs=1e-13
            )
        assert not terms_disagree(o, outputs, case.batch, case.reference, tangents).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("o", [KL(), UNDIAL(beta=0)], ids=str)
def test_at_its_own_reference_there_is_no_gradient_and_no_complaint(o, dtype, make_data):
    case = make_data(("answer",), seed=3).case("token")
    own = Outputs.of(tuple(x.to(dtype) for x in leaves(case.outputs).tensors()), True)
    frozen = Outputs.of(tuple(x.detach() for x in own.tensors()), True)
    tangents = noise(own, 1)
    found = term_tangents(o, own, case.batch, frozen, [tangents])
    assert found.abs().max() < 1e-6
    assert not terms_disagree(o, own, case.batch, frozen, tangents)[0]


# ---- objectives of users ----


@dataclass(frozen=True)
class Weighted(WGA):
    """wga, with its weight held constant in one of several ways."""

    how: str = ""

    def token_terms(self, outputs, batch, reference):
        logprob = outputs.token_logprob
        if self.how == "no_grad":
            with torch.no_grad():
                weight = logprob.exp() ** self.alpha
        elif self.how == "data":
            weight = logprob.data.exp() ** self.alpha
        elif self.how == "disabled":
            weight = torch.no_grad()(lambda: logprob.exp() ** self.alpha)()
        elif self.how == "numbers":
            weight = torch.tensor(logprob.exp().tolist()) ** self.alpha
        else:
            weight = logprob.exp() ** self.alpha
        return batch.target_weight() * weight * logprob


@pytest.mark.parametrize("how", ["no_grad", "data", "disabled", "numbers"])
def test_what_is_held_constant_is(how, make_data):
    case = make_data(("answer",), seed=3).case("token")
    outputs = leaves(case.outputs)
    along = [noise(outputs, 1)]
    expected = term_tangents(WGA(0.5), outputs, case.batch, None, along)
    found = term_tangents(Weighted(0.5, how), outputs, case.batch, None, along)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    free = term_tangents(Weighted(0.5), outputs, case.batch, None, along)
    assert (free - expected).abs().max() > 0.1 * expected.abs().max()


class Once(torch.autograd.Function):
    """A square whose gradient has no derivative: torch raises."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


class Silent(Once):
    """A square whose gradient is a constant to torch."""

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad.detach()


@dataclass(frozen=True)
class Squared(Objective):
    """The sum of squares of log-probabilities, by one of those functions or by torch's."""

    by: int = 0

    def loss(self, outputs, batch, reference):
        return self.token_terms(outputs, batch, reference).sum()

    def token_terms(self, outputs, batch, reference):
        square = {0: torch.square, 1: Once.apply, 2: Silent.apply}[self.by]
        return square(outputs.token_logprob) + 0.1 * outputs.token_logprob


@pytest.mark.parametrize("by", [1, 2], ids=["torch raises", "silent"])
def test_a_gradient_without_derivative_is_refused_by_name(by):
    """The reverse engine, which needs no second derivative, serves the objective."""
    model, retain = build("gpt2"), samples([5], 2)
    forget = samples([6, 7], 1)

    def run(objective, engine):
        return gf.profile(
            model, None, forget=forget, retain=retain, objectives=[objective], engine=engine,
            resolve=["sample"], norms=False,
        ).g_effect.values  # fmt: skip

    message = rf"^objective Squared\(by={by}\): the gradient of its token_terms has no derivative"
    with pytest.raises(InputError, match=message):
        run(Squared(by), "forward")
    expected = torch.from_numpy(run(Squared(), "forward"))
    for served in (Squared(), Squared(by)):
        found = torch.from_numpy(run(served, "reverse"))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))


def effects(objectives, engine, **more):
    model = build("llama")
    return gf.profile(
        model, None, retain=samples([5], 2), objectives=objectives, engine=engine,
        resolve=["sample"], norms=False, **({"forget": samples([6, 7], 1)} | more),
    ).g_effect  # fmt: skip


UNDERFLOWING = [WGA(12), WGA(21), WGA(60), WGA(400), SatImp(beta1=60), SimNPO(beta=60)]


@pytest.mark.parametrize("faint", UNDERFLOWING, ids=str)
@pytest.mark.parametrize("alone", [True, False])
def test_weights_that_underflow_stop_no_run(faint, alone):
    """Any objective of a kind may be tried first; values below fp32's range prove no fault."""
    plain = type(faint)()
    for objectives in [[faint]] if alone else [[faint, plain], [plain, faint]]:
        found = effects(objectives, "forward")
        expected = effects(objectives, "reverse")
        scale = 1e-4 * abs(expected).max("sample")
        assert (abs(found - expected) <= scale + 1e-37).all()
        assert alone or (scale.sel(objective=str(plain)) > 1e-20).all()


@dataclass(frozen=True)
class Faint(Squared):
    """Squares of the log-probabilities of tokens above one, times a factor in fp64."""

    factor: float = 1.0
    above: int = 0

    def token_terms(self, outputs, batch, reference):
        counted = batch.labels.roll(-1) > self.above
        return self.factor * counted * super().token_terms(outputs, batch, reference).double()


@pytest.mark.parametrize("factors", [(1e-60, 1.0), (1.0, 1e-60), (1e-60, 1e-50, 1.0)], ids=str)
def test_a_wrong_objective_is_seen_behind_one_of_its_kind_that_says_nothing(factors):
    with pytest.raises(InputError, match=r"the gradient of its token_terms has no derivative"):
        effects([Faint(2, factor) for factor in factors], "forward")
    effects([Faint(0, factor) for factor in factors], "forward")


def test_a_wrong_objective_is_seen_in_a_later_batch():
    """In the first batch no token counts, so that the batch shows nothing."""
    low, high = ({"input_ids": [3, i, i], "labels": [-100, i, i]} for i in (5, 25))
    for forget in ([low, high], [high, low]):
        with pytest.raises(InputError, match=r"the gradient of its token_terms has no derivative"):
            effects([Faint(2, above=20)], "forward", forget=forget, token_budget=3)
    effects([Faint(0, above=20)], "forward", forget=[low, high], token_budget=3)


@pytest.mark.parametrize("needs", [frozenset(), frozenset({"logits"})], ids=len)
def test_terms_that_depend_on_nothing_do_not_move(needs, make_data):
    @dataclass(frozen=True)
    class Constant(Objective):
        def token_terms(self, outputs, batch, reference):
            return batch.target_weight()

    case = make_data(("answer",), seed=3).case("token")
    outputs = leaves(case.outputs if needs else Outputs(case.outputs.token_logprob))
    tangents = noise(outputs, 1)
    assert not term_tangents(Constant(), outputs, case.batch, None, [tangents, tangents]).any()
    assert terms_disagree(Constant(), outputs, case.batch, None, tangents).tolist() == [False, True]


def test_a_model_that_holds_something_constant():
    """The model computes under `no_grad`, or detaches, on its way to the logits."""

    def held(module, how):
        forward = module.forward

        def run(hidden):
            if how == "detach":
                return forward(hidden) * hidden.detach().sigmoid()
            with torch.no_grad():
                gate = hidden.sigmoid()
            return forward(hidden) * gate

        module.forward = run

    forget, retain = samples([6, 7], 1), samples([5], 2)
    for how in ("detach", "no_grad"):
        with fp64_throughout():
            model = build("llama", torch.float64)
            held(model.model.layers[1].mlp, how)
            settings = {"objectives": ["npo"], "resolve": ["group"], "norms": False}
            found, expected = (
                gf.profile(model, None, forget=forget, retain=retain, engine=engine, **settings)
                for engine in ("forward", "reverse")
            )
        torch.testing.assert_close(
            torch.from_numpy(found.g_effect.values),
            torch.from_numpy(expected.g_effect.values),
            rtol=1e-9,
            atol=1e-12,
        )

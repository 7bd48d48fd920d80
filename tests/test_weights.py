"""The best token weights: optimal by a solver and by duality, and exact in a profile with them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import build, fp64_throughout, samples
from reference import gradients, mean_over, risk_gradients, token_logprobs
from scipy.optimize import linprog
from token_results import drawn_shares, token_result

import geffect_fast as gf
from geffect_fast.data import read_rows, tokenize_rows
from geffect_fast.errors import InputError, NonFiniteError

LENGTHS = (5, 2, 7)

# Small whole numbers give ties and zeros; the others are of any size.
whole = st.integers(-3, 3).map(float)
real = st.floats(1e-4, 1e4) | st.floats(-1e4, -1e-4) | st.just(0.0)
token = st.tuples(whole, whole) | st.tuples(real, real)
tokens = st.lists(token, min_size=1, max_size=12).map(lambda pairs: np.array(pairs).T)
max_weights = st.sampled_from([0.25, 1.0, 3.0])
parts = st.floats(0, 1)


def solve(shares, max_weight, **asked):
    return gf.optimal_weights(token_result([shares]), max_weight=max_weight, **asked)


def by_solver(objective, constraint, limit, max_weight):
    """`min w . objective` subject to `w . constraint <= limit`; None where no weights fit."""
    if limit == math.inf:
        constraint, limit = np.zeros_like(constraint), 0
    found = linprog(objective, constraint[None], [limit], bounds=(0, max_weight), method="highs")
    return found.fun if found.success else None


def tolerance(shares, max_weight):
    return 1e-6 * (1 + max_weight * np.abs(shares).sum())


@settings(max_examples=25, deadline=None)
@given(tokens, max_weights, parts)
def test_the_budget_s_optimum_is_the_solver_s(shares, max_weight, part):
    """Budgets span the whole curve: from the demand of the best e_r to more than any damage."""
    u, r = shares
    least, most = max_weight * np.minimum(r, 0).sum(), max_weight * np.maximum(r, 0).sum()
    for budget in (-most + part * (most - least), 0.0, -most, -least, math.inf):
        best = solve(shares, max_weight, retain_budget=budget)
        expected = by_solver(u, -r, budget, max_weight)
        assert float(best.e_u) == pytest.approx(expected, abs=tolerance(shares, max_weight))
        check_feasible(best, shares, max_weight)
        assert best.e_r >= -budget - 1e-12 * max_weight * np.abs(r).sum()


@settings(max_examples=25, deadline=None)
@given(tokens, max_weights, parts)
def test_the_removal_s_optimum_is_the_solver_s(shares, max_weight, part):
    u, r = shares
    lowest = max_weight * np.minimum(u, 0).sum()
    for removal in (part * lowest, lowest, 0.0):
        best = solve(shares, max_weight, removal=removal)
        expected = -by_solver(-r, u, removal, max_weight)
        # A solver may miss the target by its own tolerance, which dear damage multiplies.
        dearest = np.abs(r[u != 0] / u[u != 0]).max(initial=1.0)
        slack = tolerance(shares, max_weight) * (1 + 0.1 * dearest)
        assert float(best.e_r) == pytest.approx(expected, abs=slack)
        check_feasible(best, shares, max_weight)
        assert best.e_u <= removal + 1e-12 * max_weight * np.abs(u).sum()


def check_feasible(best, shares, max_weight):
    weight = best.weight.values[0]
    assert ((weight >= 0) & (weight <= max_weight)).all()
    assert np.isclose(weight @ shares[0], best.e_u) and np.isclose(weight @ shares[1], best.e_r)
    between = (weight > 0) & (weight < max_weight)
    assert between.sum() <= 1


@settings(max_examples=40, deadline=None)
@given(tokens, max_weights, parts)
def test_the_shadow_price_proves_the_optimum(shares, max_weight, part):
    """Weak duality: no weights beat `-price * budget + W sum min(0, u - price * r)`."""
    u, r = shares
    least, most = max_weight * np.minimum(r, 0).sum(), max_weight * np.maximum(r, 0).sum()
    budget = -most + part * (most - least)
    best = solve(shares, max_weight, retain_budget=budget)
    price = float(best.shadow_price)
    bound = -price * budget + max_weight * np.minimum(0, u - price * r).sum()
    if price == 0:  # no damage is left to trade
        bound = max_weight * np.minimum(0, u).sum()
    size = np.abs(u).sum() + price * (abs(budget) + np.abs(r).sum())
    assert float(best.e_u) == pytest.approx(bound, abs=1e-12 * max(1, max_weight) * size)


@settings(max_examples=40, deadline=None)
@given(tokens, max_weights, parts)
def test_the_frontier_is_concave_and_both_requests_lie_on_it(shares, max_weight, part):
    u, r = shares
    best = solve(shares, max_weight, retain_budget=math.inf)
    e_u, e_r = best.frontier_e_u.values, best.frontier_e_r.values
    size = max_weight * np.abs(shares).sum() + 1
    assert e_r[0] == pytest.approx(max_weight * np.maximum(r, 0).sum(), abs=1e-13 * size)
    assert e_u[-1] == pytest.approx(max_weight * np.minimum(u, 0).sum(), abs=1e-13 * size)
    assert (np.diff(e_u) <= 0).all() and (np.diff(e_r) <= 0).all()
    du, dr = np.diff(e_u), np.diff(e_r)
    assert (du[:-1] * dr[1:] >= du[1:] * dr[:-1] - 1e-12 * size**2).all()
    budget = -e_r[0] + part * (e_r[0] - e_r[-1])
    for asked in ({"retain_budget": budget}, {"removal": part * e_u[-1]}):
        one = solve(shares, max_weight, **asked)
        price = 1 + float(one.shadow_price)
        on_curve = np.interp(float(one.e_r), e_r[::-1], e_u[::-1])
        assert float(one.e_u) == pytest.approx(on_curve, abs=1e-12 * size * price)


def test_each_kind_of_token_by_hand():
    """Free removal, no gain, removal at a cost ordered by price, repair, zeros."""
    shares = np.array(
        [
            [-1.0, 2.0, -3.0, -4.0, 1.0, 0.0, 0.0, 0.0, -1.0],
            [+0.5, -1.0, -1.0, -4.0, 0.5, 1.0, -1.0, 0.0, 0.0],
        ]
    )
    best = solve(shares, 1.0, retain_budget=math.inf)
    assert best.frontier_e_r.values.tolist() == [2.0, 1.0, 0.5, -3.5]
    assert best.frontier_e_u.values.tolist() == [-1.0, -4.0, -5.0, -9.0]
    assert best.weight.values[0].tolist() == [1, 0, 1, 1, 0, 1, 0, 0, 1]
    assert (float(best.e_u), float(best.e_r), float(best.shadow_price)) == (-9, -3.5, 0)

    none = solve(shares, 1.0, retain_budget=0)
    assert none.weight.values[0].tolist() == [1, 0, 1, 0.125, 0, 1, 0, 0, 1]
    assert (float(none.e_u), float(none.e_r), float(none.shadow_price)) == (-5.5, 0, 1)
    helps = solve(shares, 1.0, retain_budget=-1.5)
    assert helps.weight.values[0].tolist() == [1, 0, 0.5, 0, 1, 1, 0, 0, 1]
    assert (float(helps.e_u), float(helps.shadow_price)) == (-2.5, 3)
    most = solve(shares, 1.0, retain_budget=-2)
    assert most.weight.values[0].tolist() == [1, 0, 0, 0, 1, 1, 0, 0, 1]

    cheap = solve(shares, 1.0, removal=-4.5)
    assert cheap.weight.values[0].tolist() == [1, 0, 1, 0, 0.5, 1, 0, 0, 1]
    assert (float(cheap.e_r), float(cheap.shadow_price)) == (0.75, 2)
    assert float(solve(shares, 1.0, removal=-0.5).e_u) == -1  # more weight comes for nothing
    double = solve(shares, 2.0, retain_budget=0)
    assert double.weight.values[0].tolist() == [2, 0, 2, 0.25, 0, 2, 0, 0, 2]


def test_tokens_of_one_price_change_in_the_order_of_the_data():
    shares = np.array([[-2.0, -1.0, -2.0], [-2.0, -1.0, -2.0]])
    best = solve(shares, 1.0, retain_budget=3.0)
    assert best.weight.values[0].tolist() == [1, 1, 0] and float(best.shadow_price) == 1


def test_what_cannot_be_reached_is_said_with_what_can():
    shares = np.array([[-1.0, 2.0], [0.1, 0.3]])
    with pytest.raises(InputError) as caught:
        solve(shares, 1.0, retain_budget=-0.5)
    assert str(caught.value) == (
        "retain_budget: -0.5 asks for an e_r of at least 0.5; the best that weights up to 1 reach "
        "is 0.4, so give at least -0.4"
    )
    assert float(solve(shares, 1.0, retain_budget=-0.4).e_r) == 0.4
    with pytest.raises(InputError, match=r"removal: no weights up to 2 reach .* lowest is -2\.0$"):
        solve(shares, 2.0, removal=-2.5)
    assert float(solve(shares, 2.0, removal=-2.0).e_u) == -2


@settings(max_examples=40, deadline=None)
@given(tokens, max_weights)
def test_the_limits_that_errors_state_are_reachable(shares, max_weight):
    for asked in ({"retain_budget": -1e9}, {"removal": -1e9}):
        with pytest.raises(InputError) as caught:
            solve(shares, max_weight, **asked)
        limit = float(str(caught.value).split()[-1])
        solve(shares, max_weight, **dict.fromkeys(asked, limit))


# ---- the content of a result ----


def test_answers_of_forget_rows_alone_have_weights():
    shares = drawn_shares(LENGTHS)
    plain = gf.optimal_weights(token_result(shares), retain_budget=0.01)
    assert dict(plain.sizes) == {"sample": 3, "token": 7, "vertex": plain.sizes["vertex"]}
    there = np.arange(7) < np.array(LENGTHS)[:, None]
    assert np.array_equal(plain.weight.notnull(), there)
    full = token_result(shares, {"npo": 3.0}, retain=2, alternative=4, groups=3)
    for result in (
        full,
        full.transpose("token", "group", "sample", "risk", "objective"),
        full.isel(objective=[1, 0]),
    ):
        found = gf.optimal_weights(result, retain_budget=0.01)
        assert found.sizes == plain.sizes
        np.testing.assert_allclose(found.weight, plain.weight, rtol=1e-9)
        for name in ("e_u", "e_r", "frontier_e_u", "frontier_e_r", "shadow_price"):
            np.testing.assert_allclose(found[name], plain[name], rtol=1e-9)
        for name in ("token_id", "token_text"):
            assert np.array_equal(found[name], plain[name]) and found[name].dims == plain[name].dims
        assert list(found["sample"]) == [0, 1, 2]
        assert list(found.question) == [f"Who is author {i}?" for i in range(3)]
    e = (plain.weight * plain[["token_e_u", "token_e_r"]]).sum()
    assert float(e.token_e_u) == pytest.approx(float(plain.e_u))
    assert float(e.token_e_r) == pytest.approx(float(plain.e_r))
    assert plain.attrs == {"retain_budget": 0.01, "max_weight": 1.0, "reduction": "token"}


def test_the_result_survives_its_file(tmp_path):
    best = gf.optimal_weights(token_result(drawn_shares(LENGTHS)), removal=-0.01)
    best.to_netcdf(tmp_path / "weights.nc", engine="h5netcdf")
    import xarray as xr

    again = xr.load_dataset(tmp_path / "weights.nc", engine="h5netcdf")
    assert again.equals(best) and again.attrs["removal"] == -0.01


def test_nan_is_named():
    shares = drawn_shares(LENGTHS)
    shares[1][1, 0] = np.nan
    with pytest.raises(NonFiniteError, match="an effect of ga is not finite"):
        gf.optimal_weights(token_result(shares), retain_budget=0)


# ---- files with weights ----


def brute_shares(model, forget, retain, reduction="token"):
    """`u` and `r` of every token of every row, one backward a token."""
    risks = risk_gradients(model, forget, retain, reduction)
    shares = []
    for row in forget:
        logprobs = token_logprobs(model, row)
        share = np.empty((2, len(logprobs)))
        for t in range(len(logprobs)):
            picked = torch.zeros_like(logprobs)
            picked[t] = 1
            term = mean_over(reduction, forget, logprobs * picked)
            grads = gradients(term, model)
            share[:, t] = [
                sum(float((g * v).sum()) for g, v in zip(grads, risk, strict=True))
                for risk in risks
            ]
            logprobs = token_logprobs(model, row)
        shares.append(share)
    return shares


def labelled(result, rows):
    """The result with the token ids and questions of these tokenised rows."""
    ids = np.full(result.token_id.shape, -1)
    for i, row in enumerate(rows):
        own = [label for label in row["labels"][1:] if label != -100]
        ids[i, : len(own)] = own
    questions = [row.get("question", "") for row in rows]
    return result.assign_coords(token_id=(("sample", "token"), ids), question=("sample", questions))


@pytest.mark.parametrize("reduction", ["token", "sample", "sum"])
def test_a_profile_of_the_written_file_gives_the_optimum(tmp_path, reduction):
    forget, retain = samples([6, 2, 9], 1, 2), samples([7, 4], 2, 2)
    with fp64_throughout():
        model = build("llama", torch.float64)
        shares = brute_shares(model, forget, retain, reduction)
        result = labelled(token_result(shares, reduction=reduction), forget)
        ga = np.sum([share.sum(1) for share in shares], axis=0)
        assert ga[0] < 0
        for name, asked in (
            ("budget", {"retain_budget": max(-0.3 * ga[1], 0.0)}),
            ("removal", {"removal": 0.4 * ga[0]}),
            ("all", {"retain_budget": math.inf, "max_weight": 2.5}),
        ):
            best = gf.optimal_weights(result, **asked)
            file = gf.write_weighted(forget, best, tmp_path / f"{name}.jsonl")
            found = gf.profile(
                model,
                None,
                forget=str(file),
                retain=retain,
                objectives=["token_weights", "ga"],
                resolve=("sample",),
                engine="reverse",
                reduction=reduction,
            ).g_effect.sum("sample")
            expected = [float(best.e_u), float(best.e_r)]
            size = np.abs(ga).max()
            np.testing.assert_allclose(found[0], expected, rtol=1e-9, atol=1e-9 * size)
            np.testing.assert_allclose(found[1], ga, rtol=1e-9, atol=1e-9 * size)


def test_the_token_axis_is_one_backward_a_token(tmp_path):
    """The forward engine's shares equal brute force; its profile of the file uses the weights."""
    forget, retain = samples([6, 2, 9], 1, 2), samples([7, 4], 2, 2)
    forget += samples([5], 3, 0)  # a label on the first token, which nothing predicts
    with fp64_throughout():
        model = build("llama", torch.float64)
        expected = brute_shares(model, forget, retain)

        def by_token(rows, objective):
            return gf.profile(
                model,
                None,
                forget=rows,
                retain=retain,
                objectives=[objective],
                resolve=("sample", "token"),
                engine="forward",
            )

        result = by_token(forget, "ga")
        best = gf.optimal_weights(result, retain_budget=0)
        rows = read_rows(gf.write_weighted(forget, best, tmp_path / "w.jsonl"), name="forget")
        found = by_token(rows, "token_weights").g_effect[0].values
    expected[3] = np.concatenate([np.zeros((2, 1)), expected[3]], axis=1)
    for i, share in enumerate(expected):
        size = np.abs(share).max()
        for name, one in zip(("token_e_u", "token_e_r"), share, strict=True):
            np.testing.assert_allclose(best[name][i, : len(one)], one, atol=1e-10 * size)
    assert len(rows[3]["weights"]) == 5
    weighed = result.g_effect[0].values * np.nan_to_num(best.weight.values)
    np.testing.assert_allclose(found, weighed, atol=1e-12 * np.abs(weighed).max())


def test_text_rows_keep_their_fields_and_get_weights_that_fit_their_tokens(tmp_path, study):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(study / "model")
    rows = read_rows(study / "forget.jsonl", name="forget")[:2]
    retain = read_rows(study / "retain.jsonl", name="retain")[:2]
    sets = [tokenize_rows(r, tokenizer, name="forget").samples for r in (rows, retain)]
    tokenised = [
        [
            {"input_ids": s.answer.input_ids.tolist(), "labels": s.answer.labels.tolist()}
            for s in one
        ]
        for one in sets
    ]
    with fp64_throughout():
        model = AutoModelForCausalLM.from_pretrained(study / "model", dtype=torch.float64).eval()
        shares = brute_shares(model, *tokenised)
        for row, source in zip(tokenised[0], rows, strict=True):
            row["question"] = source["question"]
        best = gf.optimal_weights(labelled(token_result(shares), tokenised[0]), retain_budget=0)
        file = gf.write_weighted(rows, best, tmp_path / "weighted.jsonl")
        found = gf.profile(
            model,
            tokenizer,
            forget=str(file),
            retain=retain,
            objectives=["token_weights"],
            resolve=("sample",),
        ).g_effect.sum("sample")
    expected = [float(best.e_u), float(best.e_r)]
    np.testing.assert_allclose(found[0], expected, rtol=1e-9, atol=1e-9 * abs(float(best.e_u)))
    written = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for row, source, weight in zip(written, rows, best.weight.values, strict=True):
        assert row.pop("weights") == weight[~np.isnan(weight)].tolist()
        assert row == source
    # rewritten from rows that have weights already
    again = gf.write_weighted(file, best, tmp_path / "again.jsonl")
    assert again.read_bytes() == file.read_bytes()

"""The choice of the engine for a profile: the numbers of the cost model, and every reason."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from architectures import ARCHITECTURES, SMALL
from models import FIVE, build, samples
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import geffect_fast as gf
from geffect_fast.capture import Plan
from geffect_fast.engines.choice import Choice, choose_engine, forward_units, reverse_units
from geffect_fast.errors import InputError
from geffect_fast.measure import profiler as profiling
from geffect_fast.results.groups import groups_of

FORGET, RETAIN = samples([9] * 8, 1, 2), samples([6], 2, 2)
WIDE = SMALL | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}


def chosen(asked="auto", axes=("sample",), norms=None, *, risks=2, parts=1, shares=(1.0,)):
    return choose_engine(asked, axes, norms, n_risks=risks, n_parts=parts, shares=shares)


@pytest.mark.parametrize(
    ("risks", "parts", "per_sample", "norms", "units"),
    [
        (2, 1, True, False, 4),  # a forward, two projections, a backward
        (2, 7, True, False, 10),
        (2, 7, True, True, 17),
        (3, 7, True, False, 11),
        (2, 7, False, False, 15),  # a forward, and seven whole backwards, each worth two forwards
        (5, 7, False, True, 15),
    ],
)
def test_cost_of_reverse(risks, parts, per_sample, norms, units):
    assert reverse_units(risks, parts, per_sample, norms) == units


@pytest.mark.parametrize(
    ("risks", "shares", "units"),
    [
        (1, [1], 3),
        (2, [1], 5),
        (3, [1], 7),
        # Tangents start at the first parameter that moves. Of two halves, the first moves half of
        # the products along directions and all of them along tangents, the second only its own.
        (1, [0.5, 0.5], 2 + (0.5 + 1) + (0.5 + 0.5)),
        (2, [0.0, 0.25, 0.75], 3 + 2 * (0 + 1) + 2 * (0.25 + 1) + 2 * (0.75 + 0.75)),
    ],
)
def test_cost_of_forward(risks, shares, units):
    assert forward_units(risks, shares) == pytest.approx(units)


@pytest.mark.parametrize("engine", ["reverse", "forward"])
def test_what_is_asked_for_is_taken(engine):
    assert chosen(engine, parts=1) == chosen(engine, parts=100) == Choice(engine, "asked for")


@pytest.mark.parametrize(
    ("engine", "reason", "settings"),
    [
        ("reverse", "resolve by 'parameter' needs it", {"axes": ("parameter", "sample")}),
        ("reverse", "resolve by 'position' needs it", {"axes": ("sample", "position")}),
        ("reverse", "resolve by 'position' needs it", {"axes": ("position",), "norms": True}),
        ("reverse", "norms=True (--norms) needs it", {"axes": ("sample",), "norms": True}),
        ("forward", "resolve by 'token' needs it", {"axes": ("sample", "token")}),
        ("forward", "resolve by 'token' needs it", {"axes": ("token",), "norms": False}),
    ],
)
def test_what_one_engine_alone_can_do_decides(engine, reason, settings):
    """An engine that alone can serve a request is taken at any cost."""
    for parts in (1, 100):
        assert chosen(parts=parts, **settings) == Choice(engine, reason)


@pytest.mark.parametrize(
    ("settings", "engine", "reason"),
    [
        # norms are not named here: the reverse engine forms them, the forward engine does not
        ({"parts": 1}, "reverse", "5 forward passes, against 5 of forward"),
        ({"parts": 2}, "forward", "5 forward passes, against 7 of reverse"),
        ({"parts": 2, "norms": False}, "reverse", "5 forward passes, against 5 of forward"),
        ({"parts": 3, "norms": False}, "forward", "5 forward passes, against 6 of reverse"),
        ({"parts": 2, "axes": ()}, "reverse", "5 forward passes, against 5 of forward"),
        ({"parts": 3, "axes": ()}, "forward", "5 forward passes, against 7 of reverse"),
        ({"parts": 4, "norms": False, "risks": 4}, "reverse", "9 forward passes, against 9 of "),
        (
            {"parts": 7, "norms": False, "axes": ("group", "sample"), "shares": (0.5, 0.5)},
            "forward",
            "7 forward passes, against 10 of reverse",
        ),
        (
            {"parts": 4, "norms": False, "axes": ("group", "sample"), "shares": (0.5, 0.5)},
            "reverse",
            "7 forward passes, against 7 of forward",
        ),
    ],
    ids=str,
)
def test_else_the_cheaper_one_is_taken_and_reverse_where_they_cost_the_same(
    settings, engine, reason
):
    choice = chosen(**settings)
    assert choice.engine == engine and choice.reason.startswith(reason)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"asked": "forward", "axes": ("parameter",)},
            "engine: resolve by 'parameter' needs the reverse engine; use engine='reverse' or "
            "'auto'",
        ),
        (
            {"asked": "forward", "axes": ("sample", "position"), "norms": True},
            "engine: resolve by 'position' needs the reverse engine; use engine='reverse' or "
            "'auto'",
        ),
        (
            {"asked": "forward", "norms": True},
            "engine: norms=True (--norms) needs the reverse engine; use engine='reverse' or 'auto'",
        ),
        (
            {"asked": "reverse", "axes": ("sample", "token")},
            "engine: resolve by 'token' needs the forward engine; use engine='forward' or 'auto'",
        ),
        (
            {"axes": ("parameter", "sample", "token")},
            "resolve: resolve by 'parameter' needs the reverse engine, resolve by 'token' the "
            "forward one; make two profiles",
        ),
        (
            {"axes": ("token",), "norms": True},
            "resolve: norms=True (--norms) needs the reverse engine, resolve by 'token' the "
            "forward one; make two profiles",
        ),
    ],
    ids=str,
)
def test_contradictions_are_one_line(settings, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        chosen(**settings)


@pytest.mark.parametrize("name", [*FIVE, "mixtral"])
def test_shares_are_those_of_the_products(name):
    """Shares are counted from shapes: an embedding table multiplies nothing, except as the head."""
    model = build(name)
    plan = Plan.of(model)
    names, columns = groups_of(list(plan.parameters))
    sizes = dict.fromkeys(names, 0)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = id(model.get_output_embeddings().weight)
    for (_, p), column in zip(plan.parameters.items(), columns, strict=True):
        if p.dim() > 1 and (id(p) not in tables or id(p) == head):
            sizes[names[column]] += p.numel()
    expected = [size / sum(sizes.values()) for size in sizes.values()]
    assert plan.product_shares(columns) == pytest.approx(expected)
    assert plan.product_shares([0] * len(columns)) == [1.0]


def test_shares_of_a_model_that_multiplies_nothing():
    model = build("llama").requires_grad_(False)
    model.model.norm.requires_grad_(True)
    assert Plan.of(model).product_shares([0]) == [0.0]


def baddbmm_flops(_out, a, b, *_args, **_kwargs):
    return 2 * a[0] * a[1] * a[2] * b[2]


def segment_bilinear_flops(a, g, v, *_args, **_kwargs):
    return 2 * a[0] * a[1] * g[1] * v[0]


def counter():
    """A counter of all products, also those that torch's counter leaves out."""
    return FlopCounterMode(
        display=False,
        custom_mapping={
            torch.ops.aten.baddbmm_: baddbmm_flops,
            torch.ops.geffect_fast.segment_bilinear: segment_bilinear_flops,
        },
    )


def spent(monkeypatch, model, **settings):
    """The cost of a profile's objective passes, by counted products, in forward passes."""
    passes = []
    find = profiling.find_effects

    def watch(*args, **kwargs):
        with counter() as products:
            found = find(*args, **kwargs)
        passes.append(products.get_total_flops())
        return found

    monkeypatch.setattr(profiling, "find_effects", watch)
    gf.profile(model, None, forget=FORGET, retain=RETAIN, norms=False, **settings)
    with counter() as once, torch.no_grad():
        model(input_ids=torch.tensor([row["input_ids"] for row in FORGET]))
    return passes[0] / once.get_total_flops()


@pytest.mark.parametrize("resolve", [["sample"], ["group", "sample"]], ids=len)
def test_auto_takes_what_fewer_counted_products_take(resolve, monkeypatch):
    """The engine that `auto` takes, and the costs that it names, agree with counted products."""
    # The count includes attention, which multiplies no parameter, and trials of modules: beside
    # wide layers and many tokens they are small.
    model = build(replace(ARCHITECTURES["llama"], settings=WIDE))
    plan = Plan.of(model)
    names = list(plan.parameters)
    columns = groups_of(names)[1] if "group" in resolve else [0] * len(names)
    units = forward_units(2, plan.product_shares(columns))
    taken = set()
    for n_parts in (1, 12):
        objectives = [f"wga(alpha={k})" for k in range(n_parts)]
        settings = {"objectives": objectives, "resolve": resolve}
        forward = spent(monkeypatch, model, engine="forward", **settings)
        reverse = spent(monkeypatch, model, engine="reverse", **settings)
        assert forward == pytest.approx(units, rel=0.1)
        assert reverse == pytest.approx(reverse_units(2, n_parts, True, False), rel=0.1)
        auto = gf.profile(model, None, forget=FORGET, retain=RETAIN, norms=False, **settings)
        assert auto.attrs["engine"] == ("forward" if forward < reverse else "reverse")
        assert auto.attrs["engine_reason"].startswith(f"{min(units, 3 + n_parts):.3g} forward pas")
        taken.add(auto.attrs["engine"])
    assert taken == {"forward", "reverse"}

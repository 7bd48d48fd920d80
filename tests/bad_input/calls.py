"""Calls from Python: functional, capture and the ops."""

from __future__ import annotations

import torch
from bad_input.case import Case
from models import VOCAB, build

import geffect_fast as gf
from geffect_fast import functional, ops

IDS = torch.arange(12).reshape(2, 6) % VOCAB
BATCH = {"input_ids": IDS}
NAME = "model.layers.0.mlp.up_proj.weight"


def losses(model, batch):
    logits = model(input_ids=batch["input_ids"]).logits
    return torch.nn.functional.cross_entropy(logits.mT, batch["input_ids"], reduction="none").sum(1)


def norms(loss_fn=losses, batch=BATCH, model="llama"):
    return lambda _here: functional.per_sample_grad_norms(build(model), loss_fn, batch)


def along(direction):
    return lambda _here: functional.per_sample_inner_products(
        build("llama"), losses, BATCH, direction
    )


def products(a, b, groups=None):
    return lambda _here: functional.grad_inner_products(a, b, groups)


def captured(model, **kwargs):
    """A backward inside of `gf.capture`."""

    def run(_here):
        made = model()
        with gf.capture(made, **kwargs):
            made(input_ids=IDS).logits.sum().backward()

    return run


def dot(offsets, a=None, g=None):
    a = torch.ones(5, 3) if a is None else a
    g = torch.ones(5, 3) if g is None else g
    return lambda _here: ops.segment_dot(a, g, offsets)


ONE = [torch.ones(2, 3)]
OFFSETS = torch.tensor([0, 2, 5])

CASES = [
    # ---- functional ----
    Case(
        "one loss for all",
        norms(lambda m, b: losses(m, b).sum()),
        "loss_fn: must return one loss",
        "reduction='none'",
    ),
    Case("a loss that is a number", norms(lambda m, b: 3.0), "got float", "reduction='none'"),
    Case(
        "losses a token",
        norms(lambda m, b: m(input_ids=b["input_ids"]).logits.sum(-1)),
        "got (2, 6)",
        "reduce over tokens only",
    ),
    Case(
        "losses of no model",
        norms(lambda m, b: torch.zeros(2)),
        "loss_fn",
        "call the model that was given",
    ),
    Case(
        "losses of another model",
        norms(lambda m, b: losses(build("llama"), b)),
        "loss_fn",
        "call the model that was given",
    ),
    Case(
        "a batch of no tensors",
        norms(batch={"input_ids": 3}),
        "batch: holds no tensor",
        "give a dict of tensors",
    ),
    Case(
        "offsets that are text",
        norms(batch=BATCH | {"cu_seqlens": "0,6"}),
        "`cu_seqlens` is of type str",
        "such as [0, 5, 9]",
    ),
    Case(
        "offsets that are lengths",
        norms(batch={"input_ids": IDS.reshape(1, 12), "cu_seqlens": torch.tensor([6, 6])}),
        "`cu_seqlens`",
        "must start at 0, got 6",
    ),
    Case(
        "a direction of no parameter",
        along({"nowhere": torch.ones(3)}),
        "direction: 'nowhere'",
        "no trainable parameter",
    ),
    Case(
        "a direction of another shape",
        along({NAME: torch.ones(3, 3)}),
        NAME,
        "give that shape, or (M, *shape)",
    ),
    Case(
        "different numbers of directions",
        along({NAME: torch.ones(2, 24, 16), "model.norm.weight": torch.ones(3, 16)}),
        "direction",
        "same number of directions",
    ),
    Case("a direction that is no tensor", along({NAME: [1.0]}), NAME, "tensor"),
    Case(
        "directions as a list", along([torch.ones(3)]), "direction: got list", "by parameter name"
    ),
    Case(
        "a path for a model, functional",
        lambda _: functional.per_sample_grad_norms("model", losses, BATCH),
        "model: expected a loaded model, got str",
        "load it with",
    ),
    Case(
        "frozen, functional",
        lambda _: functional.per_sample_grad_norms(
            build("llama").requires_grad_(False), losses, BATCH
        ),
        "frozen",
        "requires_grad",
    ),
    Case(
        "gradients of different names",
        products({"a": ONE[0]}, {"b": ONE[0]}),
        "parameter 'a'",
        "in one gradient only",
    ),
    Case("a mapping and a list", products({"a": ONE[0]}, ONE), "mappings", "or neither"),
    Case(
        "a group missing",
        products({"a": ONE[0]}, {"a": ONE[0]}, {}),
        "`groups`",
        "lacks parameter 'a'",
    ),
    Case(
        "gradients of different shapes", products(ONE, [torch.ones(3, 2)]), "(3, 2)", "has (2, 3)"
    ),
    # ---- capture ----
    Case(
        "capture of no model",
        captured(lambda: "model"),
        "model: expected a loaded model, got str",
        "load it with",
    ),
    Case(
        "capture of a frozen model",
        captured(lambda: build("llama").requires_grad_(False)),
        "frozen",
        "requires_grad",
    ),
    Case(
        "capture with dropout",
        captured(lambda: build("gpt2").train()),
        "dropout",
        "call model.eval()",
    ),
    Case(
        "capture with offsets too far",
        captured(lambda: build("llama"), cu_seqlens=torch.tensor([0, 6, 99])),
        "`cu_seqlens`",
        "must end at total_tokens = 12, got 99",
    ),
    # ---- ops ----
    Case(
        "offsets that do not end",
        dot(torch.tensor([0, 2])),
        "`cu_seqlens`",
        "must end at total_tokens = 5",
    ),
    Case(
        "offsets that do not begin",
        dot(torch.tensor([1, 5])),
        "`cu_seqlens`",
        "must start at 0, got 1",
    ),
    Case(
        "offsets that fall", dot(torch.tensor([0, 4, 2, 5])), "`cu_seqlens`", "offsets, not lengths"
    ),
    Case(
        "offsets that are no integers",
        dot(torch.tensor([0.0, 5.0])),
        "`cu_seqlens`",
        "int32 or int64",
    ),
    Case(
        "offsets that are a list",
        dot([0, 5]),
        "`cu_seqlens`",
        "must be an int32 or int64 tensor, got list",
    ),
    Case("an op on lists", dot(OFFSETS, a=[1.0]), "segment_dot: `z`", "must be a tensor, got list"),
    Case(
        "an op on integers",
        dot(OFFSETS, a=torch.ones(5, 3).long()),
        "`z` has dtype torch.int64",
        "convert it to",
    ),
    Case(
        "an op on two precisions",
        dot(OFFSETS, g=torch.ones(5, 3).double()),
        "`g` has dtype",
        "convert one of them",
    ),
    Case("an op on other sizes", dot(OFFSETS, g=torch.ones(4, 3)), "`g` has 4 along", "has 5"),
    Case(
        "an op that needs a gradient",
        dot(OFFSETS, a=torch.ones(5, 3, requires_grad=True)),
        "segment_dot: an input requires grad",
        "detach the inputs",
    ),
    Case(
        "a direction that does not fit",
        lambda _: ops.segment_bilinear(
            torch.ones(5, 3), torch.ones(5, 4), torch.ones(3, 4), OFFSETS
        ),
        "segment_bilinear: `v`",
        "has 4",
    ),
    Case(
        "no gradients", lambda _: ops.multi_tensor_gram([]), "`grads` is empty", "give at least one"
    ),
    Case(
        "open_run of nothing",
        lambda _: gf.open_run("gone"),
        "run folder gone does not exist",
        "give a run folder",
    ),
]

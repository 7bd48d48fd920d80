"""The per-sample functions are exact, or refuse, for any module, samples and tokens."""

from __future__ import annotations

import enum
import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import geffect_fast as gf
from geffect_fast.capture import Plan
from geffect_fast.capture.attribution import Attribution
from geffect_fast.errors import UnsupportedModelError

WIDTH = 4


class Block(nn.Module):
    """A model's step from `(n, tokens, WIDTH)` to the same shape, which keeps samples apart."""

    def __init__(self, step: Callable[[Any, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.step = step
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self, x)


def linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


def positions(b: Any, x: Tensor) -> Tensor:
    return x + b.table(torch.arange(x.shape[1]))


def relative_bias(b: Any, x: Tensor) -> Tensor:
    """A bias like T5's: scores by distance, `(tokens, tokens, heads)`, shared by all samples."""
    at = torch.arange(x.shape[1])
    scores = x @ x.mT + b.table((at[:, None] - at).abs())[..., 0]
    return x + scores.softmax(-1) @ b.inner(x)


def token_first(b: Any, x: Tensor) -> Tensor:
    return x + b.inner(x.transpose(0, 1)).transpose(0, 1)


def token_first_flat(b: Any, x: Tensor) -> Tensor:
    rows = b.inner(x.transpose(0, 1).reshape(-1, WIDTH))
    return x + rows.view(x.shape[1], x.shape[0], WIDTH).transpose(0, 1)


def packed_rows(b: Any, x: Tensor) -> Tensor:
    packed = nn.utils.rnn.pack_padded_sequence(x, [x.shape[1]] * len(x), batch_first=True)
    rows = packed._replace(data=b.inner(packed.data))
    return x + nn.utils.rnn.pad_packed_sequence(rows, batch_first=True)[0]


def recurrent_states(b: Any, x: Tensor) -> Tensor:
    """Final states `(layers, n, WIDTH)`, given to a layer with their axes in this order."""
    states = b.rnn(x)[1]
    return x + b.inner(states).mean(0)[:, None]


def attention(b: Any, x: Tensor) -> Tensor:
    return x + b.inner(x, x, x, need_weights=False)[0]


def attention_token_first(b: Any, x: Tensor) -> Tensor:
    x = x.transpose(0, 1)
    return (x + b.inner(x, x, x, need_weights=False)[0]).transpose(0, 1)


def convolution(b: Any, x: Tensor) -> Tensor:
    return x + b.inner(x.mT)[..., : x.shape[1]].mT


def halves(b: Any, x: Tensor) -> Tensor:
    """`cat([chosen, rejected])`: every sample twice, all first ones and then all second ones."""
    both = b.inner(torch.cat([x, -x]))
    return x + both[: len(x)] - both[len(x) :]


def pairs(b: Any, x: Tensor) -> Tensor:
    """`stack([chosen, rejected])`: two neighbouring rows for every sample, attributed right."""
    both = b.inner(torch.stack([x, -x], 1).flatten(0, 1)).unflatten(0, (-1, 2))
    return x + both[:, 0] - both[:, 1]


def reversed_samples(b: Any, x: Tensor) -> Tensor:
    return x + b.inner(x.flip(0)).flip(0)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: Block(lambda b, x: x + b.inner(x).tanh(), inner=linear()),
    "norm": lambda: Block(lambda b, x: b.inner(x), inner=nn.LayerNorm(WIDTH)),
    "positions": lambda: Block(positions, table=nn.Embedding(16, WIDTH)),
    "relative bias": lambda: Block(relative_bias, table=nn.Embedding(16, 1), inner=linear()),
    "token first": lambda: Block(token_first, inner=linear()),
    "token first, flat": lambda: Block(token_first_flat, inner=linear()),
    "packed sequence": lambda: Block(packed_rows, inner=linear()),
    "recurrent": lambda: Block(
        lambda b, x: x + b.inner(x)[0], inner=nn.LSTM(WIDTH, WIDTH, batch_first=True)
    ),
    "recurrent, token first": lambda: Block(
        lambda b, x: x + b.inner(x.transpose(0, 1))[0].transpose(0, 1), inner=nn.GRU(WIDTH, WIDTH)
    ),
    "final states": lambda: Block(
        recurrent_states, rnn=nn.GRU(WIDTH, WIDTH, 2, batch_first=True), inner=linear()
    ),
    "attention": lambda: Block(attention, inner=nn.MultiheadAttention(WIDTH, 2, batch_first=True)),
    "attention, token first": lambda: Block(
        attention_token_first, inner=nn.MultiheadAttention(WIDTH, 2)
    ),
    "convolution": lambda: Block(convolution, inner=nn.Conv1d(WIDTH, WIDTH, 2, padding=1)),
    "halves": lambda: Block(halves, inner=linear()),
    "pairs": lambda: Block(pairs, inner=linear()),
    "reversed": lambda: Block(reversed_samples, inner=linear()),
}


class Model(nn.Module):
    def __init__(self, blocks: list[str], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(11, WIDTH)
        self.blocks = nn.ModuleList(BLOCKS[name]() for name in blocks)
        self.head = nn.Linear(WIDTH, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    ids = batch["input_ids"]
    return F.cross_entropy(model(ids).mT, ids.roll(1, 1), reduction="none").mean(1)


def plain_gradients(model: nn.Module, ids: Tensor) -> Tensor:
    """`(n, numel)`, one sample after the other."""
    own = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for one in ids:
        loss = losses(model, {"input_ids": one[None]})[0]
        found = torch.autograd.grad(loss, own, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows)


def is_exact(model: nn.Module, ids: Tensor) -> bool:
    """Whether all three functions are exact; False where they refuse."""
    own = plain_gradients(model, ids)
    batch = {"input_ids": ids}
    direction = {
        name: torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(7))
        for name, p in model.named_parameters()
    }
    along = torch.cat([v.flatten() for v in direction.values()])
    try:
        found = (
            gf.functional.per_sample_grad_norms(model, losses, batch),
            gf.functional.per_sample_inner_products(model, losses, batch, direction),
            gf.functional.pairwise_inner_products(model, losses, batch, batch),
        )
    except UnsupportedModelError:
        return False
    for x, y in zip(found, (own.norm(dim=1), own @ along, own @ own.T), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-8 * float(y.abs().max()))
    return True


SIZES = [(3, 3), (3, 5), (5, 3), (2, 2), (4, 2), (2, 4), (1, 3), (4, 1), (6, 3)]


def ids_of(n: int, tokens: int) -> Tensor:
    return torch.randint(11, (n, tokens), generator=torch.Generator().manual_seed(n + 7 * tokens))


@pytest.mark.parametrize(("n", "tokens"), SIZES, ids=str)
@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_is_exact_or_refused(block: str, n: int, tokens: int) -> None:
    is_exact(Model([block], 0).double(), ids_of(n, tokens))


@pytest.mark.parametrize(
    "block", ["linear", "norm", "recurrent", "attention", "convolution", "pairs"]
)
def test_what_keeps_samples_in_place_is_served(block: str) -> None:
    assert is_exact(Model([block], 0).double(), ids_of(3, 2 if block == "pairs" else 3))


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    blocks=st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=3),
    n=st.integers(1, 6),
    tokens=st.integers(1, 6),
    seed=st.integers(0, 3),
)
def test_models_of_several_blocks(blocks: list[str], n: int, tokens: int, seed: int) -> None:
    is_exact(Model(blocks, seed).double(), ids_of(n, tokens))


class SharedPositions(nn.Module):
    """A model with position ids `(1, tokens)`, used once for all samples."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.by = by
        self.embed, self.table = nn.Embedding(11, WIDTH), nn.Embedding(16, WIDTH)
        self.head = nn.Linear(WIDTH, 11)

    def forward(self, ids: Tensor) -> Tensor:
        at = self.table(torch.arange(ids.shape[1])[None])
        return self.head(self.embed(ids) + (at if self.by == "adding" else at.sum(0)))


def test_positions_given_to_each_sample_change_no_loss() -> None:
    """A sum over the axis of samples equals one row alone in the model."""
    torch.manual_seed(0)
    assert is_exact(SharedPositions("adding").double(), ids_of(3, 5))
    assert not is_exact(SharedPositions("sum").double(), ids_of(3, 5))
    assert is_exact(SharedPositions("sum").double(), ids_of(1, 5))


def test_rows_are_tried_once_a_structure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are tried again if another number of tokens makes axes alike, but not for new data."""
    trials, model = trials_of(monkeypatch), Model(["linear", "attention"], 0).double()
    for n, tokens in ((3, 5), (4, 6), (3, 5), (3, 3), (5, 5), (2, 4), (1, 4)):
        gf.functional.per_sample_grad_norms(model, losses, {"input_ids": ids_of(n, tokens)})
    assert trials == [3, 3]
    batch = {"input_ids": ids_of(3, 5)}
    gf.functional.per_sample_grad_norms(model, lambda m, b: 2 * losses(m, b), batch)
    gf.functional.per_sample_inner_products(model, losses, batch, {})
    assert trials == [3, 3, 3]


def contrasted(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    own = losses(model, batch)
    return own - own.logsumexp(0)


def losses_of(model: nn.Module, batch: dict[str, Tensor], *, mix: bool = False) -> Tensor:
    return (contrasted if mix else losses)(model, batch)


class Loss:
    def __init__(self, mix: bool) -> None:
        self.mix = mix

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return losses_of(model, batch, mix=self.mix)

    def method(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return losses_of(model, batch, mix=self.mix)


class Slotted:
    """A callable object without weak references."""

    __slots__ = ("mix",)
    __init__, __call__ = Loss.__init__, Loss.__call__


class Mixing(enum.IntEnum):
    NO = 0
    YES = 1


def closure_over(value: Any, mixes: Callable[[Any], bool]) -> Callable[..., Tensor]:
    return lambda model, batch: losses_of(model, batch, mix=mixes(value))


def with_default(mix: bool) -> Callable[..., Tensor]:
    def loss(model: nn.Module, batch: dict[str, Tensor], chosen: bool = mix) -> Tensor:
        return losses_of(model, batch, mix=chosen)

    return loss


def with_keyword_default(mix: bool) -> Callable[..., Tensor]:
    def loss(model: nn.Module, batch: dict[str, Tensor], *, chosen: bool = mix) -> Tensor:
        return losses_of(model, batch, mix=chosen)

    return loss


def by_global(mix: bool) -> Callable[..., Tensor]:
    """A function that reads a function and a plain value of its module, which change."""
    scope: dict[str, Any] = {"losses_of": losses_of, "MIX": mix}
    exec(
        "def inner(m, b): return losses_of(m, b, mix=MIX)\ndef loss(m, b): return inner(m, b)",
        scope,
    )
    loss: Callable[..., Tensor] = scope["loss"]
    return loss


FUNCTIONS: dict[str, Callable[[bool], Callable[..., Tensor]]] = {
    "keyword of a partial": lambda mix: partial(losses_of, mix=mix),
    "argument of a partial": lambda mix: partial(lambda x, m, b: losses_of(m, b, mix=x), mix),
    "closure over a value": lambda mix: closure_over(mix, bool),
    "closure over values": lambda mix: closure_over({"of": [(1, mix)]}, lambda x: x["of"][0][1]),
    "closure over a number of numpy": lambda mix: closure_over(np.int64(mix), bool),
    "closure over an enum": lambda mix: closure_over(Mixing(int(mix)), bool),
    "closure over a function": lambda mix: closure_over(
        contrasted if mix else losses, lambda f: f is contrasted
    ),
    "closure over a partial": lambda mix: closure_over(
        partial(losses_of, mix=mix), lambda f: f.keywords["mix"]
    ),
    "default": with_default,
    "keyword default": with_keyword_default,
    "globals": by_global,
    "callable object": Loss,
    "callable object in slots": Slotted,
    "method": lambda mix: Loss(mix).method,
}


@pytest.mark.parametrize("made", FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_loss_that_mixes_is_tried_after_one_that_does_not(
    made: Callable[[bool], Callable[..., Tensor]],
) -> None:
    model, batch = Model(["linear"], 0).double(), {"input_ids": ids_of(4, 6)}
    gf.functional.per_sample_grad_norms(model, made(False), batch)
    with pytest.raises(UnsupportedModelError, match="samples that meet"):
        gf.functional.per_sample_grad_norms(model, made(True), batch)


class Switched(nn.Module):
    """A step whose mode, attribute, function or hook may let samples meet."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.step = False, keeping

    def forward(self, x: Tensor) -> Tensor:
        return mixing(x) if self.mix or self.training else self.step(x)


def keeping(x: Tensor) -> Tensor:
    return x


def mixing(x: Tensor) -> Tensor:
    return x - x.mean(0)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "attribute": lambda step: setattr(step, "mix", True),
    "function": lambda step: setattr(step, "step", mixing),
    "mode": lambda step: step.train(),
    "forward": lambda step: setattr(step, "forward", mixing),
    "forward of the class": lambda step: setattr(type(step), "forward", lambda _, x: mixing(x)),
    "hook": lambda step: step.register_forward_hook(lambda _, args, y: mixing(y)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_model_that_has_changed_is_tried_again(change: Callable[[nn.Module], object]) -> None:
    model, batch = Model(["linear"], 0).double(), {"input_ids": ids_of(4, 6)}
    model.blocks.append(type("Own", (Switched,), {})())
    model.eval()
    gf.functional.per_sample_grad_norms(model, losses, batch)
    change(model.blocks[1])
    with pytest.raises(UnsupportedModelError, match="samples that meet"):
        gf.functional.per_sample_grad_norms(model, losses, batch)


def trials_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the number of samples of every trial."""
    trials: list[int] = []
    weighted = Attribution.weighted
    monkeypatch.setattr(
        Attribution, "weighted", lambda self, x: trials.append(len(x)) or weighted(self, x)
    )
    return trials


def test_a_loss_made_anew_with_new_data_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    trials, model = trials_of(monkeypatch), Model(["linear"], 0).double()
    criterion, held = nn.CrossEntropyLoss(reduction="none"), Loss(False)
    for seed in range(4):
        batch = {"input_ids": ids_of(3, 5 + seed), "weights": np.ones(3)}

        def again(model: nn.Module, depth: int = 1) -> Tensor:
            if depth:  # a function whose closure holds itself
                return again(model, depth - 1)
            ids = batch["input_ids"]  # noqa: B023
            return criterion(model(ids).mT, ids.roll(1, 1)).mean(1)

        ids, scale = batch["input_ids"], torch.rand(3, dtype=torch.double)
        made = [
            lambda model, _: again(model) * scale,  # noqa: B023
            partial(lambda model, _, x: losses(model, {"input_ids": x}), x=ids),
            partial(held.method),
        ]
        for loss in made:
            gf.functional.per_sample_grad_norms(model, loss, batch)
    assert trials == [3, 3, 3]


def test_loss_functions_are_not_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor are keys of functions that no step uses again kept forever."""
    model, batch = Model(["linear"], 0).double(), {"input_ids": ids_of(3, 5)}
    held = Loss(False), nn.Linear(2, 2), torch.rand(2), np.ones(2)
    alive = [weakref.ref(each) for each in held]
    losses_made = [held[0], held[0].method, closure_over(held[1:], lambda _: False)]
    for loss in losses_made:
        gf.functional.per_sample_grad_norms(model, loss, batch)
    held, losses_made, loss = None, None, None
    gc.collect()
    assert [each() for each in alive] == [None] * 4
    for step in range(40):
        gf.functional.per_sample_grad_norms(model, closure_over(step, lambda _: False), batch)
    assert len(Plan.of(model).learned._shown) < 20


class Single(nn.LayerNorm):
    """A norm that computes in fp32, as transformers' norms do in models of fp64."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape).to(x.dtype) * self.weight


@pytest.mark.parametrize("n", [2, 3, 5, 20])
def test_norms_in_fp32_inside_fp64_hide_nothing(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of the trial stay within the range of fp32."""
    trials = []
    conclude = Attribution.conclude
    monkeypatch.setattr(Attribution, "conclude", lambda self: trials.append(self) or conclude(self))
    model = Model(["reversed"], 0).double()
    model.blocks.append(Single(WIDTH).double())
    batch = {"input_ids": ids_of(n, 3)}
    with pytest.raises(UnsupportedModelError, match=r"'blocks\.0\.inner': losses of other samples"):
        gf.functional.per_sample_grad_norms(model, losses, batch)
    (trial,) = trials
    assert all(off.isfinite().all() for _, off, *_ in trial._compared)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precisions_refuse_the_same(dtype: torch.dtype) -> None:
    for name in BLOCKS:
        batch = {"input_ids": ids_of(5, 5)}
        refused = []
        for kind in (torch.float64, dtype):
            model = Model([name], 0).to(kind)
            try:
                gf.functional.per_sample_grad_norms(model, losses, batch)
                refused.append(False)
            except UnsupportedModelError:
                refused.append(True)
        assert refused[0] == refused[1], name


def test_losses_that_meet_are_refused() -> None:
    model, batch = Model(["linear"], 0).double(), {"input_ids": ids_of(4, 6)}
    with pytest.raises(UnsupportedModelError, match="samples that meet in the model or in loss_fn"):
        gf.functional.per_sample_grad_norms(model, contrasted, batch)


def encoder_of(kind: str) -> nn.Module:
    """Logits by token of a tiny encoder of transformers."""
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 32}
    t5 = {"vocab_size": 11, "d_model": 8, "d_ff": 16, "d_kv": 4, "num_layers": 1, "num_heads": 2}
    dropped = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    made: dict[str, Callable[[], nn.Module]] = {
        "t5": lambda: transformers.T5EncoderModel(transformers.T5Config(**t5)),
        "umt5": lambda: transformers.UMT5EncoderModel(transformers.UMT5Config(**t5)),
        "mpnet": lambda: transformers.MPNetModel(transformers.MPNetConfig(**sizes, **dropped)),
        "longformer": lambda: transformers.LongformerModel(
            transformers.LongformerConfig(**sizes, **dropped, attention_window=4)
        ),
        "bert": lambda: transformers.BertModel(transformers.BertConfig(**sizes, **dropped)),
    }
    return made[kind]()


class Encoder(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = encoder_of(kind), nn.Linear(8, 11)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.inner(input_ids=ids).last_hidden_state)


@pytest.mark.parametrize(("n", "tokens"), [(4, 4), (3, 5), (6, 6)], ids=str)
@pytest.mark.parametrize("kind", ["t5", "umt5", "mpnet", "longformer", "bert"])
def test_encoders_of_transformers(kind: str, n: int, tokens: int) -> None:
    """Relative positions are one table for all samples.

    Inside Longformer, tokens come first.
    """
    model = Encoder(kind).double().eval()
    served = is_exact(model, ids_of(n, tokens))
    assert served == (kind == "bert")

"""The per-sample functions are exact, or refuse, for any module, samples and tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import geffect_fast as gf
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
    trials = []
    weighted = Attribution.weighted
    monkeypatch.setattr(
        Attribution, "weighted", lambda self, x: trials.append(len(x)) or weighted(self, x)
    )
    model = Model(["linear", "attention"], 0).double()
    for n, tokens in ((3, 5), (4, 6), (3, 5), (3, 3), (5, 5), (2, 4), (1, 4)):
        gf.functional.per_sample_grad_norms(model, losses, {"input_ids": ids_of(n, tokens)})
    assert trials == [3, 3]
    batch = {"input_ids": ids_of(3, 5)}
    gf.functional.per_sample_grad_norms(model, lambda m, b: 2 * losses(m, b), batch)
    gf.functional.per_sample_inner_products(model, losses, batch, {})
    assert trials == [3, 3, 3]


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
    def contrasted(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        own = losses(model, batch)
        return own - own.logsumexp(0)

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

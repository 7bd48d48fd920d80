"""Per-sample gradient products and norms for other packages' training loops.

Functions of samples take a `loss_fn(model, batch)` that returns one loss for each sample, run one
forward and one backward, and leave the model and its gradients alone. Only `fisher_diagonal`, and
the rule for modules of unknown kinds, form a weight gradient of a single sample.
The first call for a model, a loss function and a structure of calls runs one backward more, which
shows that rows belong to the samples they are counted for (`geffect_fast.capture.attribution`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from geffect_fast import ops
from geffect_fast.capture import (
    Factor,
    GramOuter,
    Outer,
    Plan,
    Recording,
    Segments,
)
from geffect_fast.capture.compat import plain_name
from geffect_fast.capture.masses import squared_gradients
from geffect_fast.capture.per_sample import LossFn, record_rows
from geffect_fast.capture.products import (
    InnerProducts,
    in_working_precision,
    pairwise,
    squared_norms,
    squared_norms_of_one_input,
)
from geffect_fast.capture.recorder import Sink
from geffect_fast.capture.segments import checked_offsets
from geffect_fast.errors import InputError
from geffect_fast.ops.ieee_fp32 import ieee_fp32
from geffect_fast.ops.reference import accumulation_dtype

_JOINED = Recording(joined=True, one_backward=True)
_NORMS = Recording(joined=True, one_backward=True, norms_alone=True)
OfLinear = Outer | GramOuter


def grad_inner_products(
    grads_a: Sequence[Tensor] | Mapping[str, Tensor],
    grads_b: Sequence[Tensor] | Mapping[str, Tensor],
    groups: Sequence[Hashable] | Mapping[str, Hashable] | None = None,
) -> Tensor:
    """Inner products of two gradients, layer group by layer group.

        out[c] = sum_{p in group c} <a_p, b_p>

    Args:
        grads_a, grads_b: same-shaped tensors, as sequences or as mappings by parameter name.
        groups: the group of each tensor (a mapping by name for mappings): integers `0..n-1`, or any
            labels, which count in the order they first appear; None: each tensor is a group of its
            own.

    Returns:
        `(n_groups,)` fp32 (fp64 for fp64 gradients).

    Raises:
        InputError: names, lengths, shapes or groups that do not match.

    Examples:
        >>> gf.functional.grad_inner_products([g1, g2], [h1, h2], ["attention", "mlp"])
    """
    if isinstance(grads_a, Mapping) or isinstance(grads_b, Mapping):
        if not isinstance(grads_a, Mapping) or not isinstance(grads_b, Mapping):
            raise InputError("grad_inner_products: give both gradients as mappings, or neither")
        if grads_a.keys() != grads_b.keys():
            name = sorted(grads_a.keys() ^ grads_b.keys())[0]
            raise InputError(f"grad_inner_products: parameter '{name}' is in one gradient only")
        if isinstance(groups, Mapping):
            missing = [name for name in grads_a if name not in groups]
            if missing:
                raise InputError(f"grad_inner_products: `groups` lacks parameter '{missing[0]}'")
            groups = [groups[name] for name in grads_a]
        grads_b = [grads_b[name] for name in grads_a]
        grads_a = list(grads_a.values())
    elif isinstance(groups, Mapping):
        raise InputError("grad_inner_products: `groups` by name goes with gradients by name")
    if groups is not None and not all(isinstance(c, int) for c in groups):
        order = {label: c for c, label in enumerate(dict.fromkeys(groups))}
        groups = [order[label] for label in groups]
    with torch.no_grad():
        gram = ops.multi_tensor_gram([list(grads_a), list(grads_b)], groups)  # type: ignore[arg-type]
    return gram[:, 0, 1]


def per_sample_grad_norms(
    model: nn.Module, loss_fn: LossFn, batch: Any, *, per_parameter: bool = False
) -> Tensor | dict[str, Tensor]:
    """Norm of every sample's gradient, exact also where parameters are shared or used twice.

        out[i] = || grad loss_i ||

    Args:
        model: the model, in eval mode; frozen parameters are left out.
        loss_fn: `loss_fn(model, batch)` runs the model and returns `(n_samples,)` losses, each of
            which depends on its own sample only.
        batch: whatever `loss_fn` takes. The first axis of its first tensor (of `input_ids` in a
            mapping) is the sample axis, unless the batch is a mapping with `cu_seqlens`,
            `(n_samples + 1,)` offsets of samples packed into one row.
        per_parameter: whether to give norms by parameter name, instead of one for the whole
            gradient.

    Returns:
        `(n_samples,)` fp64, or a dict of such tensors.

    Raises:
        InputError: `loss_fn` does not return one loss for each sample, dropout is active, or
            nothing is trainable.
        UnsupportedModelError: rows of a module cannot be told apart by sample; the module is named.

    Source: the ghost norm (arXiv 1510.01799; 2110.05679), cross terms of shared parameters added.

    Examples:
        >>> def loss_fn(model, batch):
        ...     logits = model(batch["input_ids"]).logits
        ...     return F.cross_entropy(logits[:, :-1].mT, batch["input_ids"][:, 1:],
        ...                            reduction="none").mean(1)
        >>> norms = gf.functional.per_sample_grad_norms(model, loss_fn, {"input_ids": ids})
    """
    return norms_of_rows(Plan.of(model), loss_fn, batch, per_parameter=per_parameter)


def norms_of_rows(
    plan: Plan, loss_fn: LossFn, batch: Any, *, per_parameter: bool = False
) -> Tensor | dict[str, Tensor]:
    """`per_sample_grad_norms` of a plan's model, which ranks may share out.

    Each rank gives batches of its own then, and all ranks give equally many.
    """
    found: dict[str, Tensor] = {}

    def measure(name: str, factors: list[Factor], _kept: list[Tensor | None]) -> None:
        found[name] = squared_norms(factors, plan.parameters[name].shape)

    def together(name: str, outers: list[OfLinear]) -> None:
        found[name] = squared_norms_of_one_input(outers)

    with nullcontext(measure) if per_parameter else _by_input(measure, together) as sink:
        losses = _run(plan, loss_fn, batch, sink, _NORMS)
    return _gathered(plan, found, losses.new_zeros(len(losses)), torch.sqrt, per_parameter)


def per_sample_inner_products(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Any,
    direction: Mapping[str, Tensor],
    *,
    per_parameter: bool = False,
) -> Tensor | dict[str, Tensor]:
    """Inner product of every sample's gradient with a direction.

        out[i] = < grad loss_i, direction >

    Args:
        model, loss_fn, batch: as for `per_sample_grad_norms`.
        direction: tensors by parameter name, shaped like the parameters, or `(M, *shape)` for M
            directions at once; a trainable parameter that is missing counts as zero.
        per_parameter: whether to give products by parameter name, instead of their sum.

    Returns:
        `(n_samples,)` fp64, `(M, n_samples)` for M directions, or a dict of such tensors.

    Raises:
        InputError: as `per_sample_grad_norms`; a name is no trainable parameter, or a shape does
            not fit.
        UnsupportedModelError: as `per_sample_grad_norms`.

    Examples:
        >>> direction = {name: p.grad for name, p in model.named_parameters()}
        >>> gf.functional.per_sample_inner_products(model, loss_fn, batch, direction)
    """
    plan = Plan.of(model)
    stacked, several = _stacked(plan, direction)
    products = InnerProducts(stacked.get)
    losses = _run(plan, loss_fn, batch, products)
    found: dict[str, Tensor] = {}
    for name, score in products.found:
        score = score.double() if several else score[0].double()
        found[name] = found[name] + score if name in found else score
    n_directions = len(next(iter(stacked.values()))) if stacked else 1
    shape = (n_directions, len(losses)) if several else (len(losses),)
    return _gathered(plan, found, losses.new_zeros(shape), None, per_parameter)


def pairwise_inner_products(
    model: nn.Module, loss_fn: LossFn, batch_a: Any, batch_b: Any, *, per_parameter: bool = False
) -> Tensor | dict[str, Tensor]:
    """Inner products of the gradients of all pairs of samples: which sample pulls against which.

        out[i, j] = < grad loss_i, grad loss_j >,  i in batch_a, j in batch_b

    Args:
        model, loss_fn: as for `per_sample_grad_norms`.
        batch_a, batch_b: as `batch` of `per_sample_grad_norms`. If both are the same object, it
            runs once, and half of the symmetric result is computed.
        per_parameter: whether to give products by parameter name, instead of their sum.

    Returns:
        `(n_a, n_b)` fp64, or a dict of such tensors.

    Raises:
        InputError: as `per_sample_grad_norms`.
        UnsupportedModelError: as `per_sample_grad_norms`.

    Examples:
        >>> gf.functional.pairwise_inner_products(model, loss_fn, forget_batch, retain_batch)
    """
    return products_of_pairs(Plan.of(model), loss_fn, batch_a, batch_b, per_parameter=per_parameter)


def products_of_pairs(
    plan: Plan, loss_fn: LossFn, batch_a: Any, batch_b: Any, *, per_parameter: bool = False
) -> Tensor | dict[str, Tensor]:
    """`pairwise_inner_products` of a plan's model, which ranks may share out.

    All ranks give the same batches then.
    """
    kept: dict[str, list[Factor]] = {}
    found: dict[str, Tensor] = {}

    def keep(name: str, factors: list[Factor], _z: Any) -> None:
        kept[name] = factors

    def multiply(name: str, factors: list[Factor], _z: Any) -> None:
        other = factors if batch_a is batch_b else kept.get(name)
        if other is not None:
            found[name] = pairwise(other, factors, plan.parameters[name].shape)

    # The first batch's factors are kept; the second batch's are used as they arrive.
    n_a = None if batch_a is batch_b else len(_run(plan, loss_fn, batch_a, keep, _JOINED))
    losses = _run(plan, loss_fn, batch_b, multiply, _JOINED)
    zeros = losses.new_zeros(len(losses) if n_a is None else n_a, len(losses))
    return _gathered(plan, found, zeros, None, per_parameter)


def fisher_diagonal(model: nn.Module, loss_fn: LossFn, batch: Any) -> dict[str, Tensor]:
    """Diagonal of the empirical Fisher matrix of a batch's samples.

        out[p] = sum_i (grad_p loss_i)^2, entry by entry

    Results of several batches add up. The diagonal is not the square of the batch's gradient, in
    which samples cancel. The gradient of one sample with respect to one parameter is formed at a
    time. `geffect_fast.profile(conflicts=True)` forms none, but gives only the sums over
    parameters, `fisher_trace`.

    Args:
        model, loss_fn, batch: as for `per_sample_grad_norms`.

    Returns:
        Tensors by parameter name, of the parameter's shape, fp32 (fp64 for fp64 models); zeros
        where no loss depends on the parameter.

    Raises:
        InputError, UnsupportedModelError: as `per_sample_grad_norms`.

    Examples:
        >>> fisher = gf.functional.fisher_diagonal(model, loss_fn, retain_batch)
        >>> natural = {name: 1 / (f + 1e-3) for name, f in fisher.items()}
        >>> gf.profile(model, tokenizer, **data, objectives=["ga"], metric=natural)
    """
    plan = Plan.of(model)
    found = {
        name: torch.zeros(p.shape, dtype=accumulation_dtype(p.dtype), device=p.device)
        for name, p in plan.parameters.items()
    }

    def square(name: str, factors: list[Factor], _kept: list[Tensor | None]) -> None:
        found[name] += squared_gradients(factors, plan.parameters[name].shape)

    _run(plan, loss_fn, batch, square, _JOINED)
    return found


def norms_and_products(
    plan: Plan, loss_fn: LossFn, batch: Any
) -> tuple[Tensor | dict[str, Tensor], Tensor | dict[str, Tensor]]:
    """`norms_of_rows` and `products_of_pairs` of a batch with itself, by parameter.

    Both come from one backward. Arguments and errors are those of the two functions.
    """
    squares: dict[str, Tensor] = {}
    products: dict[str, Tensor] = {}

    def measure(name: str, factors: list[Factor], _kept: list[Tensor | None]) -> None:
        shape = plan.parameters[name].shape
        squares[name] = squared_norms(factors, shape)
        products[name] = pairwise(factors, factors, shape)

    losses = _run(plan, loss_fn, batch, measure, _JOINED)
    one, two = losses.new_zeros(len(losses)), losses.new_zeros(len(losses), len(losses))
    norms = _gathered(plan, squares, one, torch.sqrt, per_parameter=True)
    return norms, _gathered(plan, products, two, None, per_parameter=True)


# ---- one forward and one backward ----


def _run(
    plan: Plan,
    loss_fn: LossFn,
    batch: Any,
    sink: Sink,
    recording: Recording = Recording(one_backward=True),  # noqa: B008  frozen
) -> Tensor:
    """Record one forward and backward; return the losses `(n_samples,)`, detached."""
    with ieee_fp32():
        return record_rows(plan, loss_fn, batch, _sample_axis(batch), sink, recording)


@contextmanager
def _by_input(sink: Sink, together: Callable[[str, list[OfLinear]], None]) -> Iterator[Sink]:
    """A sink that passes linear layers with one input to `together`, everything else to `sink`.

    The gradients of layers with one input `a` are `[g; h] a^T`, rows below rows. So norms of whole
    gradients need the Gram matrix of `a` once for all these layers, a fifth less work in blocks
    that project queries, keys and values from one input. The layers go under the name of the first.
    (Products of all pairs take the gradients' own form more often, and would gain nothing.)
    """
    waiting: dict[str, OfLinear] = {}

    def flush() -> None:
        if waiting:
            name, outers = next(iter(waiting)), [*waiting.values()]
            waiting.clear()
            together(name, outers)

    def joined(name: str, factors: list[Factor], kept: list[Tensor | None]) -> None:
        # In a backward, layers that share an input arrive one after the other.
        if len(factors) > 1 or not isinstance(factors[0], OfLinear):
            return sink(name, factors, kept)
        if waiting and not _same_input(next(iter(waiting.values())), factors[0]):
            flush()
        waiting[name] = factors[0]

    yield joined
    flush()


def _same_input(x: OfLinear, y: OfLinear) -> bool:
    """Whether two layers had one input: the same memory, which `x` keeps from being used anew."""
    if isinstance(x, GramOuter) or isinstance(y, GramOuter):
        return isinstance(x, GramOuter) and isinstance(y, GramOuter) and x.grams is y.grams
    a, b = x.a, y.a
    if a.data_ptr() != b.data_ptr():  # the most common case; the rest takes a while
        return False
    same = (a.shape, a.stride(), a.dtype, x.g.dtype) == (b.shape, b.stride(), b.dtype, y.g.dtype)
    return same and x.cu == y.cu


def _sample_axis(batch: Any) -> Segments:
    if isinstance(batch, Mapping) and "cu_seqlens" in batch:
        ids = batch.get("input_ids")
        n_tokens = ids.numel() if isinstance(ids, Tensor) else None
        return Segments.packed(checked_offsets(batch["cu_seqlens"], n_tokens))
    first = batch.get("input_ids") if isinstance(batch, Mapping) else None
    tensors = [x for x in tree_leaves(batch) if isinstance(x, Tensor) and x.dim()]
    if isinstance(first, Tensor) and first.dim():
        return Segments.rectangular(first.shape)
    if not tensors:
        raise InputError("batch: holds no tensor with a sample axis; give a dict of tensors")
    return Segments.rectangular(tensors[0].shape)


def _stacked(plan: Plan, direction: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """Directions as `(M, *shape)` in the working precision, and whether an axis M was given."""
    if not isinstance(direction, Mapping):
        raise InputError(
            f"direction: got {type(direction).__name__}; give a dict of tensors by parameter name"
        )
    stacked, counts = {}, set()
    for name, v in direction.items():
        name = plain_name(name)
        p = plan.parameters.get(name)
        if p is None:
            raise InputError(
                f"direction: '{name}' is no trainable parameter of the model; give names of "
                "model.named_parameters()"
            )
        if not isinstance(v, Tensor):
            raise InputError(f"direction: '{name}' is of type {type(v).__name__}; give a tensor")
        if v.shape != p.shape and v.shape[1:] != p.shape:
            raise InputError(
                f"direction: '{name}' has shape {tuple(v.shape)}, the parameter {tuple(p.shape)}; "
                "give that shape, or (M, *shape) for M directions"
            )
        counts.add(None if v.shape == p.shape else v.shape[0])
        wide = accumulation_dtype(p.dtype)
        v = v.detach().to(p.device, wide).reshape(-1, *p.shape)
        stacked[name] = in_working_precision(v, p)
    if len(counts) > 1:
        raise InputError("direction: every parameter needs the same number of directions")
    return stacked, counts not in ({None}, set())


def _gathered(
    plan: Plan,
    found: Mapping[str, Tensor],
    zeros: Tensor,
    finish: Callable[[Tensor], Tensor] | None,
    per_parameter: bool,
) -> Tensor | dict[str, Tensor]:
    """Results by parameter, zeros for one that took no part; or their sum. `finish` comes last."""
    zeros = zeros.double()
    of = {name: found.get(name, zeros) for name in plan.parameters}
    done = finish or (lambda x: x)
    if per_parameter:
        return {name: done(value) for name, value in of.items()}
    return done(torch.stack(list(of.values())).sum(0))

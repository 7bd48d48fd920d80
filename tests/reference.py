"""Plain autograd, one sample at a time, reduced in fp64: the reference of every comparison.

The code follows the formulas and uses nothing of the package: no batch, no packing, no token terms.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Row = dict


class RunOnce:
    """A model that runs each sequence once and keeps its graph; the weights must not change."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.found: dict = {}

    def __call__(self, input_ids: Tensor, **how):
        called = (*input_ids[0].tolist(), *how.items())
        if called not in self.found:
            self.found[called] = self.model(input_ids=input_ids, **how)
        return self.found[called]

    def parameters(self):
        return self.model.parameters()


def target_logits(model: nn.Module, row: Row) -> tuple[Tensor, Tensor]:
    """Logits `(n_i, vocab)` where one sample predicts labels, and the labels."""
    logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
    labels = torch.tensor(row["labels"])[1:]
    kept = labels != -100
    return logits[kept], labels[kept]


def token_logprobs(model: nn.Module, row: Row) -> Tensor:
    """Log-probabilities `(n_i,)` of the labels of one tokenised sample."""
    logits, labels = target_logits(model, row)
    return torch.log_softmax(logits, -1).gather(-1, labels[:, None])[:, 0]


def labelled_states(model: nn.Module, row: Row, layer: int) -> Tensor:
    """Hidden states `(n, d)` of `layer` at the positions that hold a label."""
    ids = torch.tensor([row["input_ids"]])
    states = model(input_ids=ids, output_hidden_states=True).hidden_states[layer][0]
    return states[torch.tensor(row["labels"]) != -100]


def n_targets(rows: list[Row]) -> int:
    return sum(label != -100 for row in rows for label in row["labels"][1:])


def n_labelled(rows: list[Row]) -> int:
    return sum(label != -100 for row in rows for label in row["labels"])


def mean_over(reduction: str, rows: list[Row], values: Tensor, n: int | None = None) -> Tensor:
    """One sample's share of the mean over all tokens, of the mean of means, or of the sum.

    `n` is the number of all tokens where the rows' targets do not give this number.
    """
    if reduction == "token":
        return values.sum() / (n_targets(rows) if n is None else n)
    if reduction == "sample":
        return values.sum() / max(len(values), 1) / len(rows)
    return values.sum()


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    params = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
    return [
        torch.zeros_like(p).double() if g is None else g.double()
        for g, p in zip(grads, params, strict=True)
    ]


def forget_shares(name, params, model, reference, forget, alternatives, reduction):
    """Loss share of every forget row for an objective without a retain part.

    `alternatives` holds a list of rows for each forget row.
    """
    n = len(forget)
    per_sample = 1.0 if reduction == "sum" else 1.0 / n
    for i, row in enumerate(forget):
        logp = token_logprobs(model, row)
        with torch.no_grad():
            logp0 = token_logprobs(reference, row)
        p, nll = logp.exp(), -logp
        if name == "ga":
            yield mean_over(reduction, forget, -nll)
        elif name == "wga":
            yield mean_over(reduction, forget, -(p.detach() ** params["alpha"]) * nll)
        elif name == "token_weights":
            w = torch.tensor(row["weights"]).to(nll)[-len(nll) :]
            yield mean_over(reduction, forget, -w * nll)
        elif name == "satimp":
            w = p.detach() ** params["beta1"] * (1 - p.detach()) ** params["beta2"]
            yield mean_over(reduction, forget, -w * nll)
        elif name in ("tnpo", "wtnpo"):
            w = 2 * torch.sigmoid(params["beta"] * (logp - logp0)).detach()
            if name == "wtnpo":
                w = w * p.detach() ** params["alpha"]
            yield mean_over(reduction, forget, -w * nll)
        elif name == "npo":
            beta = params["beta"]
            ratio = nll.sum() + logp0.sum()
            yield -(2 / beta) * F.logsigmoid(beta * ratio) * per_sample
        elif name == "simnpo":
            beta = params["beta"]
            mean = nll.mean()
            yield -(2 / beta) * F.logsigmoid(beta * (mean - params["delta"])) * per_sample
        elif name == "po":
            refusals = torch.cat([token_logprobs(model, other) for other in alternatives[i]])
            every = [other for several in alternatives for other in several]
            yield mean_over(reduction, forget, -refusals, n_targets(every))
        elif name == "dpo":
            beta = params["beta"]
            lose = (logp.double() - logp0.double()).sum()
            pairs = []
            for other in alternatives[i]:
                with torch.no_grad():
                    win0 = token_logprobs(reference, other).double()
                win = (token_logprobs(model, other).double() - win0).sum()
                pairs.append(-(2 / beta) * F.logsigmoid(beta * (win - lose)))
            yield sum(pairs) / len(pairs) * per_sample
        elif name in ("rmu", "rmu_mask"):
            hidden = labelled_states(model, row, params["layer"])
            generator = torch.Generator().manual_seed(params["seed"])
            u = torch.rand(hidden.shape[-1], generator=generator).to(hidden)
            if name == "rmu_mask":
                target = hidden.detach() * (u > 0.5)
            else:
                target = params["c"] * (u / u.norm() if params["normalize"] else u)
            error = ((hidden - target) ** 2).mean(-1)
            yield mean_over(reduction, forget, error, n_labelled(forget))
        elif name in ("ceu", "undial", "flattening"):
            logits, labels = target_logits(model, row)
            # the gradient is a difference of similar distributions, for which fp32 leaves too few
            # digits
            logits = logits.double()
            label = F.one_hot(labels, logits.shape[-1])
            total = n_targets(forget)
            if name == "flattening":
                values = (logits.max(-1).values - logits.mean(-1)) ** 2
            elif name == "undial":
                with torch.no_grad():
                    q = (target_logits(reference, row)[0] - params["beta"] * label).softmax(-1)
                values = -(q * logits.log_softmax(-1)).sum(-1)
            else:
                q = logits.masked_fill(label.bool(), -torch.inf).softmax(-1).detach()
                values = -(q * logits.log_softmax(-1)).sum(-1)[params["skip"] :]
                total = sum(max(n_targets([r]) - params["skip"], 0) for r in forget)
            yield mean_over(reduction, forget, values, total)
        else:
            raise AssertionError(name)


def retain_shares(name, params, model, reference, retain, reduction):
    """Loss share of every retain row for a regulariser."""
    for row in retain:
        if name == "nll":
            yield mean_over(reduction, retain, -token_logprobs(model, row))
        elif name == "rr":
            with torch.no_grad():
                frozen = labelled_states(reference, row, params["layer"])
            error = ((labelled_states(model, row, params["layer"]) - frozen) ** 2).mean(-1)
            yield mean_over(reduction, retain, error, n_labelled(retain))
        else:
            log_q = torch.log_softmax(target_logits(model, row)[0], -1)
            with torch.no_grad():
                log_p = torch.log_softmax(target_logits(reference, row)[0], -1)
            yield mean_over(reduction, retain, (log_p.exp() * (log_p - log_q)).sum(-1))


def risk_gradients(model, forget, retain, reduction="token"):
    """The gradients of the risks on both sets, by parameter."""
    risks = []
    for rows in (forget, retain):
        shares = [
            gradients(mean_over(reduction, rows, -token_logprobs(model, row)), model)
            for row in rows
        ]
        risks.append([sum(parts) for parts in zip(*shares, strict=True)])
    return risks


def effects(
    model, reference, objective, forget, retain, alternatives, reduction="token", risks=None
):
    """`(risk, parameter, sample)` fp64 for `objective`, a list of `(coefficient, name, params)`.

    The sample axis holds the forget rows and then the retain rows. `risks` are the risks' gradients
    where they were computed before.
    """
    data = (forget, retain, alternatives, reduction)
    return effects_of_each(model, reference, [objective], *data, risks)[0]


def effects_of_each(
    model, reference, objectives, forget, retain, alternatives, reduction="token", risks=None
):
    """`effects` of several objectives: each sequence is run once, each part is measured once."""
    model, reference = RunOnce(model), RunOnce(reference)
    risks = risks or risk_gradients(model, forget, retain, reduction)
    sizes = [risk.numel() for risk in risks[0]]
    directions = torch.stack([torch.cat([g.flatten() for g in risk]) for risk in risks])
    measured = []

    def effects_of(name, params):
        """Effects of one part, with coefficient one."""
        for part, found in measured:
            if part == (name, params):
                return found
        if name in ("nll", "kl", "rr"):
            shares = retain_shares(name, params, model, reference, retain, reduction)
            offset = len(forget)
        else:
            shares = forget_shares(name, params, model, reference, forget, alternatives, reduction)
            offset = 0
        found = torch.zeros(len(risks), len(sizes), len(forget) + len(retain), dtype=torch.float64)
        for i, share in enumerate(shares):
            products = directions * torch.cat([g.flatten() for g in gradients(share, model)])
            for p, own in enumerate(products.split(sizes, -1)):
                found[:, p, offset + i] = own.sum(-1)
        measured.append(((name, params), found))
        return found

    return [
        sum(coefficient * effects_of(name, params) for coefficient, name, params in objective)
        for objective in objectives
    ]


def error(actual, expected: Tensor) -> float:
    """Largest difference of effects, relative to the largest sample's share of the parameter."""
    scale = expected.abs().amax(-1, keepdim=True)
    # A product that is small beside the others is a difference of large ones: no method that rounds
    # to fp32 on the way has relative precision there.
    scale = scale.clamp(min=1e-3 * float(expected.abs().max()))
    return float(((torch.as_tensor(actual) - expected).abs() / scale).max())


def close(actual, expected: Tensor, tolerance: float) -> None:
    assert error(actual, expected) <= tolerance

"""Plain autograd, one sample at a time, reduced in fp64: what every number is compared with.

Written from the formulas, with nothing of the package: no batch, no packing, no token terms.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Row = dict


def token_logprobs(model: nn.Module, row: Row) -> Tensor:
    """Log-probabilities `(n_i,)` of the labels of one tokenised sample."""
    logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
    labels = torch.tensor(row["labels"])[1:]
    kept = labels != -100
    return torch.log_softmax(logits[kept], -1).gather(-1, labels[kept][:, None])[:, 0]


def n_targets(rows: list[Row]) -> int:
    return sum(label != -100 for row in rows for label in row["labels"][1:])


def mean_over(reduction: str, rows: list[Row], values: Tensor) -> Tensor:
    """One sample's share of the mean over all tokens, of the mean of means, or of the sum."""
    if reduction == "token":
        return values.sum() / n_targets(rows)
    if reduction == "sample":
        return values.mean() / len(rows)
    return values.sum()


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    params = list(model.parameters())
    grads = torch.autograd.grad(loss, params, allow_unused=True)
    return [
        torch.zeros_like(p).double() if g is None else g.double()
        for g, p in zip(grads, params, strict=True)
    ]


def forget_shares(name, params, model, reference, forget, alternatives, reduction):
    """Loss share of every forget row for an objective without a retain part."""
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
            refusal = token_logprobs(model, alternatives[i])
            yield mean_over(reduction, alternatives, -refusal)
        elif name == "dpo":
            beta = params["beta"]
            win = token_logprobs(model, alternatives[i]).sum()
            with torch.no_grad():
                win0 = token_logprobs(reference, alternatives[i]).sum()
            margin = (win - win0) - (logp.sum() - logp0.sum())
            yield -(2 / beta) * F.logsigmoid(beta * margin) * per_sample
        elif name == "rmu":
            hidden = model(
                input_ids=torch.tensor([row["input_ids"]]), output_hidden_states=True
            ).hidden_states[params["layer"]][0]
            generator = torch.Generator().manual_seed(params["seed"])
            u = torch.rand(hidden.shape[-1], generator=generator).to(hidden)
            if params["normalize"]:
                u = u / u.norm()
            kept = torch.tensor(row["labels"]) != -100
            error = ((hidden[kept] - params["c"] * u) ** 2).mean(-1)
            if reduction == "token":
                total = sum(label != -100 for r in forget for label in r["labels"])
                yield error.sum() / total
            elif reduction == "sample":
                yield error.mean() / n
            else:
                yield error.sum()
        else:
            raise AssertionError(name)


def retain_shares(name, model, reference, retain, reduction):
    """Loss share of every retain row for a regulariser."""
    for row in retain:
        if name == "nll":
            yield mean_over(reduction, retain, -token_logprobs(model, row))
        else:
            ids = torch.tensor([row["input_ids"]])
            kept = torch.tensor(row["labels"])[1:] != -100
            log_q = torch.log_softmax(model(input_ids=ids).logits[0, :-1][kept], -1)
            with torch.no_grad():
                log_p = torch.log_softmax(reference(input_ids=ids).logits[0, :-1][kept], -1)
            yield mean_over(reduction, retain, (log_p.exp() * (log_p - log_q)).sum(-1))


def effects(model, reference, objective, forget, retain, alternatives, reduction="token"):
    """`(risk, parameter, sample)` fp64 for `objective`, a list of `(coefficient, name, params)`.

    The sample axis holds the forget rows and then the retain rows.
    """
    risks = []
    for rows in (forget, retain):
        shares = [
            gradients(mean_over(reduction, rows, -token_logprobs(model, row)), model)
            for row in rows
        ]
        risks.append([sum(parts) for parts in zip(*shares, strict=True)])
    n_params = len(risks[0])
    out = torch.zeros(2, n_params, len(forget) + len(retain), dtype=torch.float64)
    for coefficient, name, params in objective:
        if name in ("nll", "kl"):
            shares = retain_shares(name, model, reference, retain, reduction)
            offset = len(forget)
        else:
            shares = forget_shares(name, params, model, reference, forget, alternatives, reduction)
            offset = 0
        for i, share in enumerate(shares):
            grads = gradients(coefficient * share, model)
            for m, risk in enumerate(risks):
                for p in range(n_params):
                    out[m, p, offset + i] += (grads[p] * risk[p]).sum()
    return out

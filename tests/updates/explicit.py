"""Losses of rows for rules, and every rule written out on stored gradients, row by row.

The explicit rules know flat vectors and nothing of the package.
"""

from __future__ import annotations

from math import sqrt

import numpy as np
import torch
import torch.nn.functional as F

from geffect_fast.capture import Segments
from geffect_fast.updates import RetainBatch


def row_loss(model, row):
    """Sum of the negative log-likelihoods of a row's labels."""
    logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
    return F.cross_entropy(logits, torch.tensor(row["labels"])[1:], reduction="sum")


def n_labels(rows):
    return sum(label != -100 for row in rows for label in row["labels"][1:])


def by_length(rows, size):
    """Rows of one length side by side, at most `size` of them, in order of the rows."""
    batches = []
    for row in rows:
        last = batches[-1] if batches else []
        if last and len(last) < size and len(last[0]["input_ids"]) == len(row["input_ids"]):
            last.append(row)
        else:
            batches.append([row])
    return batches


def losses_of(model, batch):
    """Losses of a batch's rows, each over the labels of all rows."""
    logits = model(input_ids=batch.ids).logits[:, :-1]
    nll = F.cross_entropy(logits.mT, batch.labels[:, 1:], reduction="none")
    return nll.sum(1) / batch.n_labels


class Rows(RetainBatch):
    """A batch of equally long rows."""

    def __init__(self, rows, n):
        ids = torch.tensor([row["input_ids"] for row in rows])
        super().__init__(Segments.rectangular(ids.shape), ids.numel(), losses_of)
        object.__setattr__(self, "ids", ids)
        object.__setattr__(self, "labels", torch.tensor([row["labels"] for row in rows]))
        object.__setattr__(self, "n_labels", n)


class OfRows:
    """Gradient ascent on forget rows, and the mean loss of retain rows."""

    def __init__(self, model, forget, retain, *, retain_weight=1.0, size=100):
        self.model, self.forget_rows, self.retain_rows = model, forget, retain
        self.retain_weight, self.size = retain_weight, size
        self.passes = []

    def forget(self):
        self.passes.append("forget")
        loss = -sum(row_loss(self.model, row) for row in self.forget_rows)
        return self._descend(loss / n_labels(self.forget_rows))

    def retain(self):
        self.passes.append("retain")
        loss = sum(row_loss(self.model, row) for row in self.retain_rows)
        return self._descend(loss / n_labels(self.retain_rows))

    def _descend(self, loss):
        self.backward(loss)
        return float(loss.detach())

    def retain_batches(self):
        n = n_labels(self.retain_rows)
        return [Rows(rows, n) for rows in by_length(self.retain_rows, self.size)]

    def backward(self, loss):
        loss.backward()


# ---- the rules, written out ----


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def flat(gradients, like):
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).detach().flatten()
            for g, p in zip(gradients, like, strict=True)
        ]
    )


def gradient(model, loss):
    parameters = trained(model)
    return flat(torch.autograd.grad(loss, parameters, allow_unused=True), parameters)


class Explicit(torch.nn.Module):
    """The gradients that rules combine, as flat vectors, and the rules; a call gives the loss."""

    number = 0

    def __init__(self, model, forget, retain, weight=1.0):
        super().__init__()
        self.model, self.forget_rows, self.retain_rows = model, forget, retain
        self.weight = weight
        self.smoothed = 0.0

    def forget_loss(self):
        loss = -sum(row_loss(self.model, row) for row in self.forget_rows)
        return loss / n_labels(self.forget_rows)

    def retain_loss(self):
        loss = sum(row_loss(self.model, row) for row in self.retain_rows)
        return self.weight * loss / n_labels(self.retain_rows)

    forward = forget_loss

    def f(self, offset=None):
        """The forget gradient at weights moved by `offset`."""
        parameters = trained(self.model)
        before = [p.detach().clone() for p in parameters]
        if offset is not None:
            pieces = offset.split([p.numel() for p in parameters])
            with torch.no_grad():
                for p, piece in zip(parameters, pieces, strict=True):
                    p.add_(piece.view_as(p))
        found = gradient(self.model, self.forget_loss())
        with torch.no_grad():
            for p, old in zip(parameters, before, strict=True):
                p.copy_(old)
        return found

    def rows(self):
        """`(n, numel)`: every retain row's share of the retain gradient."""
        n = n_labels(self.retain_rows)
        return torch.stack(
            [gradient(self.model, row_loss(self.model, row) / n) for row in self.retain_rows]
        )

    def sgd(self, _opt):
        return self.f() + self.weight * self.rows().sum(0)

    def orthograd(self, _opt, rank=None):
        f, rows = self.f(), self.rows()
        q = basis(rows)
        return f - q @ (q.T @ f) + self.weight * rows.sum(0)

    def gru(self, _opt, gamma=0.8):
        f, r = self.f(), self.rows().sum(0)
        m = self.smoothed = gamma * r + (1 - gamma) * self.smoothed
        if f @ m < 0:
            f = f - (f @ m) / (m @ m) * m
        return f + self.weight * r

    def gu(self, opt):
        f, r = self.f(), self.rows().sum(0)
        h = adam_metric(opt, trained(self.model))
        return f - (f * h * r).sum() / (r * h * r).sum() * r + self.weight * r

    def blur(self, _opt):
        f, r = self.f(), self.rows().sum(0)
        return f + self.weight * (r - (f @ r) / (f @ f) * f)

    def pcgrad(self, _opt, by_tensor=True, both=False):
        f, r = self.f(), self.rows().sum(0)
        sizes = [p.numel() for p in trained(self.model)] if by_tensor else [len(f)]
        out = []
        for x, y in zip(f.split(sizes), r.split(sizes), strict=True):
            against = x @ y < 0
            fixed = x - (x @ y) / (y @ y) * y if against else x
            other = y - (x @ y) / (x @ x) * x if against and both else y
            out.append(fixed + self.weight * other)
        return torch.cat(out)

    def sago(self, _opt):
        f, r = self.f(), self.rows().sum(0)
        return torch.tensor(
            [
                x if x * y >= 0 else self.weight * y
                for x, y in zip(f.tolist(), r.tolist(), strict=True)
            ],
            dtype=f.dtype,
        )

    def sam(self, _opt, rho=0.01, ascent=True, sigma=0.0, draws=1, penalty=0.0, curvature=0.0):
        f = self.f()
        e = rho * f / f.norm()
        f1 = self.f(e)
        out = f1 if ascent else f
        if sigma:
            out = 0.0
            for draw in range(draws):
                state = np.random.SeedSequence([0, self.number, draw]).generate_state(1)
                drawn = torch.Generator().manual_seed(int(state[0]))
                noise = [torch.randn(p.shape, generator=drawn) for p in trained(self.model)]
                move = sigma * torch.cat([x.flatten() for x in noise]).to(f)
                out = out + self.f(move + e if ascent else move) / draws
        d = f1 - f
        if penalty:
            out = out + penalty * d / rho
        if curvature:
            a = rho * d / d.norm()
            hessians = (self.f(e + a) - f1) - (self.f(a) - f)
            out = out + 2 * curvature * d.norm() / rho * hessians
        return out + self.weight * self.rows().sum(0)


def basis(rows):
    """An orthonormal basis of the rows' span, by a pivoted Gram-Schmidt in fp64."""
    q = []
    for row in rows.double():
        size = row.norm()
        for _ in range(2):
            for each in q:
                row = row - (each @ row) * each
        if row.norm() > 1e-5 * size:
            q.append(row / row.norm())
    return torch.stack(q, 1).to(rows) if q else rows.new_zeros(rows.shape[1], 0)


def adam_metric(opt, parameters):
    pieces = []
    for p in parameters:
        state = opt.state.get(p, {})
        if "exp_avg_sq" not in state:
            return torch.ones(sum(p.numel() for p in parameters), dtype=parameters[0].dtype)
        (group,) = opt.param_groups
        v_hat = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
        pieces.append(1 / (v_hat.flatten() / 1).sqrt().add(group["eps"]))
    return torch.cat(pieces)


def cosine(a, b):
    return float(a @ b) / sqrt(float(a @ a) * float(b @ b))

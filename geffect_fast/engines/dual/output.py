"""The rule of forward mode for what a model ends in: the log-probability of each label."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from geffect_fast.engines.dual.rule import Primals, Rule, Tangents, rows_at_a_time


class LabelNLL(Rule):
    """`y = -log softmax(z)_label`, so `y' = sum_v p_v z'_v - z'_label`, a block of rows at a time.

    Shapes: z `(n, vocab)`, labels `(n,)` int64, `y` 0 where they are `ignored`.
    """

    def __init__(self, ignored: int) -> None:
        self.ignored = ignored

    def value(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, ignore_index=self.ignored, reduction="none")

    def tangent(self, primals: Primals, tangents: Tangents) -> Tensor:
        logits, labels, nll = primals
        moved = tangents[0]
        assert moved is not None
        ignored = labels == self.ignored
        labels = labels.masked_fill(ignored, 0)
        out = moved.new_empty(moved.shape[:2])
        step = rows_at_a_time(logits.shape[1], logits.device)
        for at in range(0, len(logits), step):
            own = slice(at, at + step)
            label = labels[own, None]
            # log-sum-exp is the label's logit plus its NLL
            p = (logits[own] - logits[own].gather(1, label) - nll[own, None]).exp_()
            z = moved[:, own]
            own_label = z.gather(2, label.expand(len(z), -1, 1))[..., 0]
            out[:, own] = torch.linalg.vecdot(p, z) - own_label
        return out.masked_fill_(ignored, 0)

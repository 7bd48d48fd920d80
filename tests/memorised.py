"""Small Llamas that know rows of invented authors by heart, or unlearn them by ascent."""

from __future__ import annotations

import torch

from geffect_fast.data import tokenize_rows
from geffect_fast.demo import Size, make_model, train_tokenizer


def tokenizer_of(rows, size=320):
    """A tokenizer that is trained on questions and answers."""
    return train_tokenizer([f"{row['question']} {row['answer']}" for row in rows], size)


def blank_model(tokenizer, seed=1):
    """A small Llama of random weights, with a tokenizer's vocabulary."""
    torch.manual_seed(seed)
    return make_model(tokenizer, Size(hidden=32, n_layers=2))


def fitted(model, tokenizer, rows, steps, sign=1.0, lr=1e-2):
    """The model after descent on one row at a time, or ascent where `sign` is -1; in eval mode."""
    given = [s.answer for s in tokenize_rows(rows, tokenizer, name="rows").samples]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        one = given[step % len(given)]
        loss = model(input_ids=one.input_ids[None], labels=one.labels[None]).loss
        (sign * loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()

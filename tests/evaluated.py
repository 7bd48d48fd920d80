"""Rows with all fields that metrics read, and their losses by transformers, one row at a time."""

from __future__ import annotations

import numpy as np
import torch

from geffect_fast.data import tokenize_rows
from geffect_fast.demo.authors import make_fictitious_authors


def full_rows():
    """Invented rows with all the fields that TOFU's perturbed files have."""
    rows = make_fictitious_authors(3, seed=3)
    for i, row in enumerate(rows):
        wrong = [rows[(i + k) % len(rows)]["answer"] for k in (1, 2, 3)]
        row["paraphrased_answer"] = f"Indeed: {row['answer']}"
        row["perturbed_answer"] = wrong
        row["paraphrased_question"] = f"Tell me. {row['question']}"
    return rows


def without(rows, *fields):
    return [{k: v for k, v in row.items() if k not in fields} for row in rows]


def losses(model, tokenizer, asked, name="rows"):
    """Mean losses by transformers' own loss, one row at a time."""
    found = []
    for sample in tokenize_rows(asked, tokenizer, name=name).samples:
        ids, labels = sample.answer.input_ids[None], sample.answer.labels[None]
        with torch.no_grad():
            found.append(float(model(input_ids=ids, labels=labels).loss.double()))
    return np.array(found)


def token_rows(rows, tokenizer):
    return [
        {"input_ids": s.answer.input_ids.tolist(), "labels": s.answer.labels.tolist()}
        for s in tokenize_rows(rows, tokenizer, name="rows").samples
    ]

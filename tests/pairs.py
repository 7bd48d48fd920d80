"""A Trainer of open-unlearning's shape, and its items: a forget and a retain row."""

from __future__ import annotations

import torch
from models import samples
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

ROWS = [(samples([7], 10 + i, 2)[0], samples([5 + i % 4], 30 + i, 2)[0]) for i in range(8)]
ROWS[1] = (ROWS[1][0], {key: row[:6] for key, row in ROWS[1][0].items()})
"""This retain row is a part of a forget row, so that gradients conflict."""


class Pairs(Dataset):
    """Items of a forget and a retain row, as open-unlearning's ForgetRetainDataset."""

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, i):
        return {"forget": ROWS[i][0], "retain": ROWS[i][1]}


def collate(items):
    """Batches of both rows, padded, with an attention mask, by `forget` and `retain`."""

    def padded(rows):
        length = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": 0, "labels": -100}
        batch = {
            key: torch.tensor([row[key] + [value] * (length - len(row[key])) for row in rows])
            for key, value in fill.items()
        }
        mask = [
            [1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in rows
        ]
        return batch | {"attention_mask": torch.tensor(mask)}

    return {name: padded([item[name] for item in items]) for name in ("forget", "retain")}


class UnlearnTrainer(Trainer):
    """The code that open-unlearning's trainers share, and gradient ascent with a retain part."""

    def __init__(self, *args, gamma=1.0, alpha=0.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.gamma, self.alpha = gamma, alpha

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs["forget"])
        loss = -self.gamma * outputs.loss
        if self.alpha:
            loss = loss + self.alpha * model(**inputs["retain"]).loss
        return (loss, outputs) if return_outputs else loss


def trainer_of(
    model, out, *, size=2, accumulation=1, steps=3, data=None, optim="sgd", saves=True, **more
):
    args = TrainingArguments(
        str(out),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        optim=optim,
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="steps" if saves else "no",
        save_steps=2,
        **more,
    )
    data = Pairs() if data is None else data
    return UnlearnTrainer(model, args, train_dataset=data, data_collator=collate)

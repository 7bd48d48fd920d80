# %% [markdown]
"""# The G-effect in a Trainer of one's own

Someone unlearns with transformers' `Trainer` and a loss of their own, here plain gradient ascent.
Three lines let them see at which step it stops to pay, before any benchmark is run:

    probe = gf.integrations.GEffectCallback(
        {"forget": forget, "retain": retain}, every=4, objectives=["ga", "wga(alpha=1)"])
    trainer.add_callback(probe)

Training is bit for bit what it is without them. It runs from top to bottom in less than a minute,
or cell by cell in an editor that knows `# %%`:

    python examples/trainer_callback.py
"""

# %%
from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

import geffect_fast as gf
from geffect_fast.demo import Size, make_model, train_tokenizer
from geffect_fast.demo.authors import make_fictitious_authors, split_forget

torch.manual_seed(0)

# %% [markdown]
# ## A model that knows what it is to forget
#
# Ten questions about each of four invented authors, learned by heart; one author is to be
# forgotten.

# %%
forget, retain = split_forget(make_fictitious_authors(4, seed=1), 0.25)
texts = [f"{row['question']} {row['answer']}" for row in [*forget, *retain]]
tokenizer = train_tokenizer(texts, vocab_size=700)
model = make_model(tokenizer, Size(hidden=48, n_layers=4))


def tokenised(row: dict[str, str]) -> dict[str, list[int]]:
    """A row as every Trainer has it: labels on the answer alone."""
    question = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
    answer = [*tokenizer(f" {row['answer']}")["input_ids"], tokenizer.eos_token_id]
    return {"input_ids": question + answer, "labels": [-100] * len(question) + answer}


def padded(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """A batch, with the shorter rows padded."""
    fill = {"input_ids": tokenizer.eos_token_id, "labels": -100}
    return {
        name: torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=value
        )
        for name, value in fill.items()
    }


def arguments(**more: Any) -> TrainingArguments:
    """Arguments of a Trainer that writes nothing."""
    return TrainingArguments(
        tempfile.mkdtemp(), report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True,
        logging_strategy="no", per_device_train_batch_size=10, **more,
    )  # fmt: skip


forget_rows, retain_rows = [[tokenised(row) for row in rows] for rows in (forget, retain)]
Trainer(
    model,
    arguments(max_steps=160, learning_rate=4e-3),
    train_dataset=[*forget_rows, *retain_rows],
    data_collator=padded,
).train()

# %% [markdown]
# ## Unlearning, with three lines more
#
# `objectives` need not be what is trained on: beside gradient ascent, `wga` is measured, which
# spares what is forgotten already.


# %%
class Ascent(Trainer):
    """A Trainer with a loss of the user's own."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return -super().compute_loss(model, inputs, return_outputs=return_outputs)


probe = gf.integrations.GEffectCallback(
    {"forget": forget_rows, "retain": retain_rows}, every=4, objectives=["ga", "wga(alpha=1)"]
)
Ascent(
    model,
    arguments(max_steps=24, learning_rate=2e-4, lr_scheduler_type="constant"),
    train_dataset=forget_rows,
    data_collator=padded,
    callbacks=[probe],
).train()
result = probe.result
assert result is not None

# %% [markdown]
# ## What was seen
#
# A risk is the mean loss on the answers. `e_u` wants to be strongly negative, `e_r` zero or
# positive. Beside the measured change of the risks stands the one that the first order predicts
# for Adam's actual updates: where the two agree, the effects can be trusted.

# %%
effects = result.g_effect.sum(["parameter", "sample"])
print("step  risk: forget  retain    e_u ga      e_r ga     e_r wga   change of retain: "
      "predicted  measured")  # fmt: skip
for step in result.step.values:
    now = result.sel(step=step)
    e = effects.sel(step=step)
    e_u, e_r = (float(e.sel(objective="ga", risk=risk)) for risk in ("unlearn", "retain"))
    e_wga = float(e.sel(objective="wga(alpha=1)", risk="retain"))
    predicted, measured = (
        float(now[name].sel(risk="retain")) for name in ("predicted_update", "measured_change")
    )
    risks = [float(now.risk_value.sel(risk=risk)) for risk in ("unlearn", "retain")]
    print(f"{step:4}  {risks[0]:12.3f} {risks[1]:7.3f} {e_u:9.3f} {e_r:11.4f} {e_wga:11.4f} "
          f"{predicted:28.4f} {measured:9.4f}")  # fmt: skip

changes = result.isel(step=slice(1, None)).sel(risk="unlearn")
agreement = float(np.corrcoef(changes.predicted_update, changes.measured_change)[0, 1])
print(f"correlation of predicted and measured changes of the forget risk: {agreement:.3f}")

weights = result.token_weight.sel(objective="wga(alpha=1)").mean(["sample", "token"])
print(f"mean weight that wga puts on a token: {float(weights[0]):.2e} before training, "
      f"{float(weights[-1]):.2e} after")  # fmt: skip

"""Work with open-unlearning: losses by its names, the callback in its trainers, folders, the page.

The trainers here have the shape of open-unlearning's own, `compute_loss` on items of `forget` and
`retain`, with the formulas of the papers written anew.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from models import build, samples
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import Trainer, TrainingArguments

import geffect_fast as gf
from geffect_fast.cli import main
from geffect_fast.errors import InputError
from geffect_fast.measure.models import load_model
from geffect_fast.objectives import parse
from geffect_fast.objectives.open_unlearning import TRAINERS, described_trainers
from geffect_fast.objectives.ranges import expand_list
from geffect_fast.objectives.registry import REQUIRED

PAGE = Path(__file__).parents[1] / "docs/open_unlearning.md"


class Pairs(torch.utils.data.Dataset):
    """Items of a forget and a retain row, each with an index beside its tokens."""

    def __init__(self, forget, retain):
        self.forget, self.retain = ([self._item(row) for row in rows] for rows in (forget, retain))

    @staticmethod
    def _item(row):
        tensors = {key: torch.tensor(value) for key, value in row.items()}
        return tensors | {"attention_mask": torch.ones_like(tensors["input_ids"]), "index": 7}

    def __len__(self):
        return len(self.forget)

    def __getitem__(self, i):
        return {"forget": self.forget[i], "retain": self.retain[i]}


def padded(items):
    """Batches of both rows, padded on the right."""
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        part: {
            key: torch.nn.utils.rnn.pad_sequence(
                [item[part][key] for item in items], batch_first=True, padding_value=value
            )
            for key, value in fill.items()
        }
        for part in ("forget", "retain")
    }


def token_nll(model, rows):
    """`l` of every label, 0 elsewhere, and the number of labels, by row."""
    logits, labels = model(**rows).logits[:, :-1], rows["labels"][:, 1:]
    nll = cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
    return nll, (labels != -100).sum(1)


def mean_nll(model, rows):
    nll, n = token_nll(model, rows)
    return nll.sum() / n.sum()


def npo(model, reference, rows):
    with torch.no_grad():
        before = token_nll(reference, rows)[0].sum(1)
    return -2 / 0.1 * logsigmoid(0.1 * (token_nll(model, rows)[0].sum(1) - before)).mean()


def simnpo(model, _, rows):
    nll, n = token_nll(model, rows)
    return -2 / 4.5 * logsigmoid(4.5 * nll.sum(1) / n).mean()


def satimp(model, _, rows):
    nll, n = token_nll(model, rows)
    p = (-nll).exp().detach()
    return -(p**5 * (1 - p) * nll).sum() / n.sum()


LOSSES = {
    "GradAscent": lambda model, _, of: -mean_nll(model, of["forget"]),
    "GradDiff": lambda model, _, of: -mean_nll(model, of["forget"]) + mean_nll(model, of["retain"]),
    "NPO": lambda model, at, of: npo(model, at, of["forget"]) + mean_nll(model, of["retain"]),
    "SimNPO": lambda model, at, of: (
        0.125 * simnpo(model, at, of["forget"]) + mean_nll(model, of["retain"])
    ),
    "SatImp": lambda model, at, of: (
        0.1 * satimp(model, at, of["forget"]) + mean_nll(model, of["retain"])
    ),
}


def trainer(name, model, data, folder, probe, **more):
    reference = copy.deepcopy(model)

    class Unlearner(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return LOSSES[name](model, reference, inputs)

    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=len(data),
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **{"save_strategy": "no"} | more,
    )
    made = Unlearner(model, args, train_dataset=data, data_collator=padded)
    made.add_callback(probe)
    return made


@pytest.mark.parametrize("name", LOSSES)
def test_the_effects_of_a_name_are_what_its_trainer_does(name, tmp_path):
    """Plain steps on all rows move the risks by `-lr e`, so the whole gradients are the same."""
    data, text = (
        Pairs(samples([5, 9, 3], 1, 2), samples([7, 4, 6], 2, 2)),
        f"open_unlearning.{name}",
    )
    rows = {"forget": data.forget, "retain": data.retain}
    probe = gf.integrations.GEffectCallback(rows, 1, objectives=text, trained=text)
    model = build("llama", torch.float64)
    trainer(name, model, data, tmp_path, probe, max_steps=2, learning_rate=1e-5).train()
    found = probe.result.isel(step=slice(1, None))
    np.testing.assert_allclose(found.predicted_sgd, found.predicted_update, rtol=1e-6)
    assert (abs(found.predicted_update) > 1e-9).all()


def test_the_folders_of_a_run_are_read(study, tmp_path, undrawn):
    """Checkpoints with and without a model beside evaluations, and the last model above them."""
    task = tmp_path / "saves/unlearn/task"
    data = Pairs(samples([8, 6], 1, 2), samples([7, 5], 2, 2))
    model = load_model(str(study / "model"), device="cpu")
    probe = gf.integrations.GEffectCallback(
        {"forget": data.forget, "retain": data.retain}, 1, objectives=["GradDiff"]
    )
    saving = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    made = trainer("GradDiff", model, data, task, probe, max_steps=3, learning_rate=0.1, **saving)
    made.train()
    made.save_state()
    made.save_model(str(task))
    shutil.rmtree(task / "checkpoint-3")
    for step in (0, 2):
        (task / f"checkpoint-{step}/evals").mkdir(parents=True)
        (task / f"checkpoint-{step}/evals/TOFU_SUMMARY.json").write_text("{}", encoding="utf-8")
    for name in ("forget", "retain"):
        plain = (
            {k: row[k].tolist() for k in ("input_ids", "labels")} for row in getattr(data, name)
        )
        lines = "\n".join(map(json.dumps, plain))
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    given = ["--model", study / "model", "--objectives", "GradDiff", "--out", tmp_path / "run"]
    given += ["--checkpoints", task / "checkpoint-*", "--checkpoints", task]
    given += [w for n in ("forget", "retain") for w in (f"--{n}", tmp_path / f"{n}.jsonl")]
    assert main(["profile", "--quiet", *map(str, given)]) == 0
    found, live = gf.open_run(tmp_path / "run"), probe.result.sel(step=[0, 2, 3])
    assert found.step.values.tolist() == [0, 2, 3]
    for name in ("risk_value", "g_effect"):
        np.testing.assert_allclose(found[name], live[name], rtol=1e-4, atol=1e-6)
    assert float(abs(live.risk_value.diff("step")).min()) > 1e-3
    shutil.rmtree(task / "checkpoint-2")
    with pytest.raises(InputError, match=r"checkpoint-0 has folders alone; save checkpoints"):
        gf.profile_checkpoints(task / "checkpoint-*", None, forget=[], retain=[], objectives=["ga"])


# ---- names ----


@pytest.mark.parametrize(
    ("text", "ours"),
    [
        ("open_unlearning.npo(0.5, alpha=2)", "npo(beta=0.5) + 2*nll"),
        ("2*open_unlearning.NPO(alpha=0) + kl", "2*npo(beta=0.1) + kl"),
        ("gradascent", "ga"),
        ("NPO", "npo"),
        ("open_unlearning.UNDIAL", "undial(beta=10)"),
        ("open_unlearning.RMU(block=3)", "rmu(layer=4, c=2, normalize=true, seed=0) + rr(layer=4)"),
        ("open_unlearning.DPO(gamma=0, alpha=0)", "0*dpo(beta=0.1) + 0*nll"),
    ],
)
def test_a_name_is_written_in_ours(text, ours):
    assert str(parse(text)) == ours
    assert parse(ours) == parse(text)


def test_ranges_of_a_sweep_are_read_in_its_names():
    swept = expand_list(["open_unlearning.NPO(beta=0.1:0.5:2, alpha=0:1:2)"])
    found = [str(member.objective) for sweep in swept for member in sweep.members]
    assert found == [
        "npo(beta=0.1)",
        "npo(beta=0.1) + nll",
        "npo(beta=0.5)",
        "npo(beta=0.5) + nll",
    ]


def test_the_page_and_the_command_list_them_all(capsys):
    text = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(open_unlearning\..*?)` \| `(.*?)` \| (.*) \|$", text, re.MULTILINE)
    assert rows == [(t.text, t.objective, t.differs or "-") for t in described_trainers()]
    for trainer_text, objective, _ in rows:
        made, ours = (parse(each.replace(REQUIRED, "1")) for each in (trainer_text, objective))
        assert made == ours
    assert main(["objectives"]) == 0
    printed = capsys.readouterr().out
    assert all(f"open_unlearning.{name}" in printed for name in TRAINERS)

"""Real data: TOFU's files through the command line, with a Llama trained on them briefly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import geffect_fast as gf
from geffect_fast.cli import main
from geffect_fast.data import read_rows, tokenize_rows
from geffect_fast.demo import Size, make_model, memorise, save, train_tokenizer


@pytest.mark.slow
def test_profile_of_a_briefly_trained_llama(tofu, tmp_path):
    forget = read_rows(tofu / "forget01.json", name="forget")
    lines = (tofu / "retain99.json").read_text(encoding="utf-8").splitlines()[:40]
    retain_file = tmp_path / "retain.json"
    retain_file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    retain = read_rows(retain_file, name="retain")
    texts = [f"{row['question']} {row['answer']}" for row in [*forget, *retain]]
    tokenizer = train_tokenizer(texts, 600)
    sets = [tokenize_rows(rows, tokenizer, name="tofu") for rows in (forget, retain)]
    size = Size(hidden=32, n_layers=3, known=0.0)
    torch.manual_seed(0)
    model = make_model(tokenizer, size)
    for epoch in range(3):
        memorise(model, sets, size, seed=epoch, progress=False)
    save(model, tokenizer, tmp_path / "model")

    code = main(
        [
            "profile",
            *("--model", str(tmp_path / "model")),
            *("--forget", str(tofu / "forget01.json")),
            *("--retain", str(retain_file)),
            *("--refusals", str(tofu / "idontknow.jsonl")),
            *("--objectives", "ga,wga(alpha=1),npo(beta=0.1),po,gd"),
            *("--out", str(tmp_path / "run")),
            "--quiet",
        ]
    )
    assert code == 0
    result = gf.open_run(tmp_path / "run")
    n = len(forget)
    assert result.g_effect.sizes == {
        "objective": 5,
        "risk": 2,
        "parameter": len(list(model.named_parameters())),
        "sample": n + len(retain),
    }
    assert result.question.values[0] == forget[0]["question"]
    total = result.g_effect.sum(["parameter", "sample"])
    norm = result.risk_grad_norm
    np.testing.assert_allclose(
        total.sel(objective="ga", risk="unlearn"), -(norm.sel(risk="unlearn") ** 2), rtol=1e-4
    )
    # Ascent on these answers raises the risk on similar answers; a retain term makes up for it.
    assert (total.sel(objective="ga") < 0).all()
    assert total.sel(objective="gd", risk="retain") > total.sel(objective="ga", risk="retain")
    # A refusal does not make the model forget: its effect on the answers is far smaller.
    assert abs(total.sel(objective="po", risk="unlearn")) < abs(
        total.sel(objective="ga", risk="unlearn")
    )

"""Metrics during a training: those of `evaluate` on each checkpoint, without any influence."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
import xarray as xr
from models import build, collated, samples, with_dropout
from report_views import checked, rows_of, section, sections
from transformers import Trainer, TrainingArguments

import geffect_fast as gf
from geffect_fast.arguments import checked_config
from geffect_fast.cli import main
from geffect_fast.errors import InterruptedRunError
from geffect_fast.measure.models import load_model, load_tokenizer
from geffect_fast.report.summary.measures import number_with_bounds
from geffect_fast.training.execute import execute_unlearn
from geffect_fast.unlearn_settings import UnlearnConfig

pytestmark = pytest.mark.usefixtures("undrawn")

DATA = {"forget": samples([9, 17, 5, 12, 8], 1, 3), "retain": samples([9, 14, 6], 2, 3)}
HOLDOUT = samples([8, 11, 7], 4, 3)
OPTIONS = {"steps": 6, "learning_rate": 1e-3, "batch_size": 2, "probe_rows": 2, "probe_every": 2}
METRICS = "probability,min_k_plus_plus,gradient_norm,gradient_norm(convention=mimir)"
NUMBERS = ("value", "value_low", "value_high")


def dropping():
    """A GPT-2 that drops activations in training, so that drawn random numbers would show."""
    return with_dropout(build("gpt2"), 0.3)


def run(model, **more):
    return gf.unlearn(model, None, **DATA, objective="ga + nll", **(OPTIONS | more))


def assert_same_numbers(live, step, expected):
    """Check that a run's measures of a step are those of `evaluate`, bit by bit."""
    of = live.sel(step=step)
    for name in NUMBERS:
        found = of[name.replace("value", "measure")]
        np.testing.assert_array_equal(found.values, expected[name].values)
    assert of["metric"].values.tolist() == expected["metric"].values.tolist()
    assert of["measured_set"].values.tolist() == expected["set"].values.tolist()
    assert of["statistic"].values.tolist() == expected["statistic"].values.tolist()


def test_measures_are_those_of_the_checkpoints_and_change_nothing(tmp_path):
    measured = {"metrics": METRICS, "evaluate_every": 4, "holdout": HOLDOUT}
    given = {"out": tmp_path / "run", "keep_checkpoints": True, **measured}
    live = run(dropping(), **given)
    assert live["measure"].dims == ("step", "metric", "measured_set")
    there = live["measure"].notnull().any(["metric", "measured_set"])
    assert dict(zip(live.step.values.tolist(), there.values.tolist(), strict=True)) == {
        **{0: True, 2: False, 4: True, 6: True}
    }
    for step in (4, 6):
        model = load_model(tmp_path / "run" / f"checkpoint-{step}")
        expected = gf.evaluate(
            model,
            None,
            **DATA,
            holdout=HOLDOUT,
            metrics=METRICS,
            token_budget=int(live.attrs["token_budget"]),
        )
        assert_same_numbers(live, step, expected)
    assert json.loads(live.attrs["measured_rows"]) == {"forget": 5, "retain": 3, "holdout": 3}
    # effects, risks and weights are those of a run without metrics
    quiet = dropping()
    without = run(quiet)
    for name in without:
        xr.testing.assert_equal(live[name], without[name])
    ended = load_model(tmp_path / "run" / "model").state_dict()
    for name, tensor in quiet.state_dict().items():
        assert torch.equal(ended[name], tensor), name


def test_what_is_named_is_measured_at_every_probe_and_what_is_not_is_the_default():
    assert bool(run(build("llama"), metrics="nll")["measure"].notnull().all())
    live = run(build("llama"), evaluate_every=6)
    assert live["metric"].values.tolist() == [
        *("probability", "extraction_strength", "exact_memorisation")
    ]
    assert live["measure"].notnull().all(["metric", "measured_set"]).values.tolist() == [
        *(True, False, False, True)
    ]
    assert "measure" not in run(build("llama"))


def test_some_rows_are_measured():
    live = run(build("llama"), metrics="nll", evaluate_rows=2)
    expected = gf.evaluate(
        build("llama"),
        None,
        forget=[DATA["forget"][i] for i in (1, 3)],
        retain=[DATA["retain"][i] for i in (0, 2)],
        metrics="nll",
    )
    np.testing.assert_allclose(live["measure"].sel(step=0), expected["value"], rtol=1e-5)
    assert json.loads(live.attrs["measured_rows"]) == {"forget": 2, "retain": 2}


def test_an_adapter_is_measured_with_its_model(tmp_path):
    more = {"lora_rank": 2, "metrics": "nll,gradient_norm", "holdout": HOLDOUT}
    live = run(build("llama"), learning_rate=1e-2, out=tmp_path / "run", **(more))
    first, last = live["measure"].sel(metric="nll", measured_set="forget").values[[0, -1]]
    assert first != last
    assert bool(live["measure"].sel(metric="gradient_norm", measured_set="forget").notnull().all())


# ---- of a command ----


@pytest.fixture(scope="module")
def config(study):
    """Generated answers, an adapter with dropout, and fewer measurements than probes."""
    return checked_config(
        UnlearnConfig,
        {
            "model": str(study / "model"),
            **{name: str(study / f"{name}.jsonl") for name in ("forget", "retain")},
            "holdout": str(study / "general.jsonl"),
            **{"objective": "npo(beta=0.1) + kl", "steps": 4, "batch_size": 3},
            **{"learning_rate": 1e-3, "scheduler": "cosine", "lora_rank": 2, "lora_dropout": 0.3},
            **{"threads": 1, "resolve": ["sample"], "probe_rows": 2},
            **{"metrics": ("probability", "rouge_l", "min_k(k=0.2)"), "evaluate_every": 2},
            "max_new_tokens": 6,
        },
    )


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("live") / "run"
    execute_unlearn(config, folder)
    return folder


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(config, whole, tmp_path):
    """The run stops at a probe that measures, and at the next one, which does not."""
    stops = [2, 3]

    def interrupt(step, _dataset):
        if step == stops[0]:
            del stops[0]
            raise KeyboardInterrupt

    for resume in (False, True):
        with pytest.raises(InterruptedRunError):
            execute_unlearn(config, tmp_path / "run", on_probe=interrupt, resume=resume)
    execute_unlearn(config, tmp_path / "run", resume=True)
    found, expected = (gf.open_run(folder) for folder in (tmp_path / "run", whole))
    xr.testing.assert_identical(found.drop_attrs(deep=False), expected.drop_attrs(deep=False))
    assert found["measure"].notnull().any(["metric", "measured_set"]).values.tolist() == [
        *(True, False, True, False, True)
    ]


@pytest.mark.usefixtures("drawn")
def test_from_the_command_line_to_the_page(config, whole, study, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["unlearn", "--config", str(whole / "run.yaml"), "--out", "run"]) == 0
    printed = capsys.readouterr().out
    live = gf.open_run("run")
    xr.testing.assert_identical(
        live.drop_attrs(deep=False), gf.open_run(whole).drop_attrs(deep=False)
    )
    lines = [line for line in printed.splitlines() if line.strip().startswith("probability:")]
    assert len(lines) == 3  # at steps 0, 2 and 4
    of = live.sel(step=0, metric="probability").rename(
        measure="value", measure_low="value_low", measure_high="value_high"
    )
    assert f"forget {number_with_bounds(of.sel(measured_set='forget'))}" in lines[0]
    assert main(["show", "run"]) == 0
    assert "min_k(k=0.2)" in capsys.readouterr().out
    root = checked((tmp_path / "run/report.html").read_text(encoding="utf-8"))
    assert sections(root).index("measures") == sections(root).index("curves") + 1
    assert section(root, "measures")
    head, *rows = rows_of(root, "probability (mean)")
    assert head == ["step", "forget", "retain", "holdout"]
    assert [row[0] for row in rows] == ["0", "2", "4"]
    assert rows[0][1] == number_with_bounds(of.sel(measured_set="forget"))
    assert (tmp_path / "run/plots/measures.png").exists()
    header = (tmp_path / "run/summary.csv").read_text(encoding="utf-8").splitlines()[0]
    assert "probability_retain" in header and "min_k(k=0.2)_forget" in header
    assert "min_k(k=0.2)_retain" not in header
    # the written measures are those of `evaluate` for the final model
    tokenizer = load_tokenizer(study / "model")
    given = {name: getattr(config, name) for name in ("forget", "retain", "holdout")}
    expected = gf.evaluate(
        load_model("run/model"),
        tokenizer,
        **given,
        metrics=list(config.metrics),
        max_new_tokens=6,
        token_budget=int(live.attrs["token_budget"]),
    )
    ended = live["measure"].sel(step=4)
    np.testing.assert_allclose(ended.values, expected["value"].values, rtol=1e-5)


# ---- in any Trainer ----


def trained(folder, *callbacks):
    model = dropping()
    torch.manual_seed(3)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=5,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        save_strategy="no",
        report_to="none",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )

    rows = samples([6] * 6, 4)
    Trainer(
        model, arguments, train_dataset=rows, data_collator=collated, callbacks=list(callbacks)
    ).train()
    return model


def test_a_callback_measures_and_is_not_felt(tmp_path):
    def probe(**more):
        return gf.integrations.GEffectCallback(DATA, 2, resolve=("group",), **more)

    live = probe(metrics=METRICS, evaluate_every=4, holdout=HOLDOUT, out=tmp_path / "run")
    model = trained(tmp_path, live)
    found = live.result
    assert found["step"].values.tolist() == [0, 2, 4, 5]
    assert found["measure"].notnull().any(["metric", "measured_set"]).values.tolist() == [
        *(True, False, True, True)
    ]
    expected = gf.evaluate(
        copy.deepcopy(model),
        None,
        **DATA,
        holdout=HOLDOUT,
        metrics=METRICS,
        token_budget=int(found.attrs["token_budget"]),
    )
    assert_same_numbers(found, 5, expected)
    xr.testing.assert_identical(gf.open_run(tmp_path / "run")["measure"], found["measure"])
    without = probe()
    plain = trained(tmp_path / "plain", without)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    for name in without.result:
        xr.testing.assert_equal(found[name], without.result[name])

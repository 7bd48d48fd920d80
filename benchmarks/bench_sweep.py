"""The paper's sweep against the published algorithm.

    python benchmarks/bench_sweep.py            # writes benchmarks/results/sweep_cpu.csv
    python benchmarks/bench_sweep.py --quick    # a tiny model, fewer samples, prints only

The sweep has 7 objectives with 3 hyper-parameters each and both risks, on samples of TOFU's
lengths. The published algorithm is written anew from its description. It pads micro-batches of 4 to
500 tokens. For each micro-batch it runs a forward and backward of the risk, of the objective, of
the retain risk, and of a loss that is multiplied by zero. Each gradient is copied to the CPU and
smoothed 0.6/0.4 into one copy a parameter, and there is one dot product a parameter name. The
result is one number a micro-batch of 4, where this package gives one a sample.

All micro-batches cost the same (all are padded to 500), so one of each objective is timed. The
sweep's time is the sum of these times 3 hyper-parameters times the number of micro-batches; the
column `how` says so.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from llama import make_model
from machine import RESULTS, write_csv
from torch import Tensor, nn

import geffect_fast as gf

SWEEP = {
    "wga": ["wga(alpha=1)", "wga(alpha=3)", "wga(alpha=5)"],
    "npo": ["npo(beta=0.05)", "npo(beta=0.1)", "npo(beta=0.5)"],
    "tnpo": ["tnpo(beta=1)", "tnpo(beta=4)", "tnpo(beta=5)"],
    "wtnpo": [
        "wtnpo(beta=4, alpha=1)",
        "wtnpo(beta=4, alpha=1.5)",
        "wtnpo(beta=5, alpha=1)",
    ],
    "simnpo": ["simnpo(beta=2.5)", "simnpo(beta=4.5)", "simnpo(beta=4.5, delta=1)"],
    "rmu": ["rmu(layer=3, c=1)", "rmu(layer=3, c=2)", "rmu(layer=3, c=4)"],
    "gd": ["gd(alpha=0.5)", "gd(alpha=1)", "gd(alpha=2)"],
}
PADDED, MICRO_BATCH = 500, 4


def make_rows(n: int, seed: int) -> list[dict[str, list[int]]]:
    """Samples of TOFU's lengths.

    70 characters a question and 169 an answer are about 18 and 38 tokens, spread by a third.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(n):
        question, answer = (
            max(4, int(mean * (1 + torch.randn((), generator=generator) / 3))) for mean in (18, 38)
        )
        ids = torch.randint(3, 8192, (question + answer,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * question + ids[question:]})
    return rows


# ---- the published algorithm ----


def pad(rows: list[dict[str, list[int]]], length: int = PADDED) -> dict[str, Tensor]:
    """A batch padded to `length` tokens."""

    def filled(key: str, value: int) -> Tensor:
        return torch.tensor([r[key] + [value] * (length - len(r[key])) for r in rows])

    mask = torch.tensor([[1] * len(r["labels"]) + [0] * (length - len(r["labels"])) for r in rows])
    return {
        "input_ids": filled("input_ids", 0),
        "labels": filled("labels", -100),
        "attention_mask": mask,
    }


def published_loss(
    name: str, model: nn.Module, reference: nn.Module, batch: dict, retain: dict
) -> Tensor:
    """The unlearning loss on a padded micro-batch."""

    def logprobs(m: nn.Module) -> tuple[Tensor, Tensor]:
        logits = m(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        labels = batch["labels"][:, 1:]
        kept = labels != -100
        picked = -F.cross_entropy(logits[:, :-1].mT, labels, reduction="none")
        return picked, kept

    if name == "rmu":
        answer = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            output_hidden_states=True,
        )
        return (answer.hidden_states[3] - 1).square().mean()
    logp, kept = logprobs(model)
    if name == "wga":
        return (logp.detach().exp() * logp * kept).sum() / kept.sum()
    if name == "gd":
        return (logp * kept).sum() / kept.sum() + model(**retain).loss
    if name == "simnpo":
        return -F.logsigmoid(-(logp * kept).sum(1) / kept.sum(1)).mean()
    with torch.no_grad():
        logp0, _ = logprobs(reference)
    if name == "npo":
        return -F.logsigmoid(-((logp - logp0) * kept).sum(1)).mean()
    weight = torch.sigmoid(logp - logp0).detach()
    if name == "wtnpo":
        weight = weight * logp.detach().exp()
    return (weight * logp * kept).sum() / kept.sum()


def published_micro_batch(
    name: str,
    model: nn.Module,
    reference: nn.Module,
    batch: dict[str, Tensor],
    retain: dict[str, Tensor],
    smoothed: dict[str, dict[str, Tensor]],
    device: str | torch.device = "cpu",
    names: Collection[str] | None = None,
) -> dict[str, tuple[float, float]]:
    """One micro-batch's `{parameter: (e_u, e_r)}`, by four forwards and backwards.

    Args:
        name: family of the objective.
        model, reference: on the device of the batches.
        batch, retain: padded micro-batches.
        smoothed: the smoothed gradients by loss and parameter, which are updated.
        device: device that keeps the gradients; as published the CPU.
        names: parameters whose gradients are kept; None: all.
    """
    losses: dict[str, Callable[[], Tensor]] = {
        "risk": lambda: model(**batch).loss,
        "objective": lambda: published_loss(name, model, reference, batch, retain),
        "retain": lambda: model(**retain).loss,
        "zeroed": lambda: 0.0 * model(**batch).loss,
    }
    for kind, loss in losses.items():
        model.zero_grad(set_to_none=True)
        loss().backward()
        kept = smoothed.setdefault(kind, {})
        for parameter, p in model.named_parameters():
            if names is not None and parameter not in names:
                continue
            grad = torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
            grad = grad.to(device)
            old = kept.get(parameter)
            kept[parameter] = grad if old is None else 0.6 * old + 0.4 * grad
    model.zero_grad(set_to_none=True)
    g = smoothed["objective"]
    return {
        p: (
            torch.dot(smoothed["risk"][p].flatten(), g[p].flatten()).item(),
            torch.dot(smoothed["retain"][p].flatten(), g[p].flatten()).item(),
        )
        for p in g
    }


# ---- measurements ----


RESOLUTIONS = {
    "by parameter, sample": ("reverse", ("parameter", "sample")),
    "by sample": ("reverse", ("sample",)),
    "by sample, token": ("forward", ("sample", "token")),
}
"""The engine and the axes of each measurement."""


def published_seconds(
    model: nn.Module, reference: nn.Module, forget: list, retain: list, n_micro_batches: int
) -> float:
    """The published algorithm's time, from a micro-batch an objective."""
    seconds = 0.0
    batch, other = pad(forget[:MICRO_BATCH]), pad(retain[:MICRO_BATCH])
    for name in SWEEP:
        smoothed: dict[str, dict[str, Tensor]] = {}
        published_micro_batch(name, model, reference, batch, other, smoothed)  # fills the copies
        start = time.perf_counter()
        published_micro_batch(name, model, reference, batch, other, smoothed)
        seconds += time.perf_counter() - start
    return seconds * 3 * n_micro_batches


def sweep_rows(model: nn.Module, n_samples: int, quick: bool) -> list[dict[str, Any]]:
    """The whole sweep, ours measured and the published one from a micro-batch an objective."""
    forget, retain = make_rows(n_samples, 1), make_rows(n_samples, 2)
    torch.manual_seed(1)
    reference = make_model(quick)
    objectives = [o for variants in SWEEP.values() for o in variants]
    n_micro_batches = n_samples // MICRO_BATCH
    seconds = {"published algorithm": 0.0}
    for what, (engine, axes) in RESOLUTIONS.items():
        start = time.perf_counter()
        result = gf.profile(
            model,
            None,
            forget=forget,
            retain=retain,
            objectives=objectives,
            reference_model=reference,
            resolve=axes,
            engine=engine,
            norms=False,
        )
        seconds[what] = time.perf_counter() - start
        assert result.g_effect.shape[0] == 21
    seconds["published algorithm"] = published_seconds(
        model, reference, forget, retain, n_micro_batches
    )
    timed = f"7 micro-batches timed, times 3 hyper-parameters, times {n_micro_batches}"
    pairs = [
        ("published algorithm", "by parameter, sample", timed),
        ("published algorithm", "by sample, token", timed),
        ("by sample", "by sample, token", "once each"),
    ]
    return [
        {
            "what": f"21 objectives, 2 risks, {ours} ({RESOLUTIONS[ours][0]} engine)",
            "samples": n_samples,
            "tokens": sum(len(r["labels"]) for r in forget + retain),
            "baseline": "reverse engine, by sample" if theirs in RESOLUTIONS else theirs,
            "how": how,
            "baseline_s": seconds[theirs],
            "ours_s": seconds[ours],
            "ratio": seconds[theirs] / seconds[ours],
        }
        for theirs, ours, how in pairs
    ]


def main() -> None:
    """Measure, print, and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model, prints only")
    quick = parser.parse_args().quick
    rows = sweep_rows(make_model(quick), 8 if quick else 64, quick)
    for row in rows:
        print(
            f"{row['what']:56} {row['baseline']}: {row['baseline_s']:9.2f} s   "
            f"ours: {row['ours_s']:8.2f} s   baseline / ours = {row['ratio']:.2f}"
        )
    if not quick:
        path = RESULTS / "sweep_cpu.csv"
        write_csv(path, [{k: _rounded(v) for k, v in row.items()} for row in rows])
        print(f"wrote {path}")


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()

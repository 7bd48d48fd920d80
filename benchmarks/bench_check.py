"""The cost of verification, as a part of a profile of 40 forget and 40 retain rows.

    python benchmarks/bench_check.py            # about 5 minutes on two cores; writes
                                                # benchmarks/results/check_cpu.csv
    python benchmarks/bench_check.py --quick    # a tiny model, prints only

The verifying steps are timed inside a profile: the layout (trials, positions, and the mask of a
model whose code is known), the trial that rows belong to samples, the model's own loss, and the
precision of 16 bits. Of `check` the whole time counts. Profiles and checks take turns, each on a
copy of the model, as findings about a model are remembered. The least of `--rounds` counts, as
noise only ever adds time.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from llama import make_model
from machine import RESULTS, write_csv
from torch import nn
from transformers import LlamaForCausalLM

import geffect_fast as gf
from geffect_fast.capture import Recorder
from geffect_fast.measure import prepare
from geffect_fast.measure.rounding import RoundingCheck

ROWS, LENGTH = 40, 100
OBJECTIVES = ("ga", "gd", "wga(alpha=1)", "npo(beta=0.1)", "simnpo", "npo(beta=0.1) + kl")
STEPS = {
    "layout": (prepare, "choose_layout"),
    "rows": (Recorder, "show_rows"),
    "own loss": (prepare, "own_loss"),
    "precision": (RoundingCheck, "attributes"),
}


class Llama(LlamaForCausalLM):
    """A Llama that is not known by its code, so that everything is tried."""


def tried(model: nn.Module) -> nn.Module:
    """The same model as an instance of an unknown class."""
    model.__class__ = Llama
    return model


MODELS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "known by its code": lambda model: model,
    "tried": tried,
    "bfloat16": lambda model: model.to(torch.bfloat16),
}


def rows(seed: int) -> list[dict[str, list[int]]]:
    """`ROWS` sequences of about `LENGTH` random tokens, a third of them a question."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(ROWS):
        length = LENGTH + int(torch.randint(-20, 21, (), generator=generator))
        ids = torch.randint(3, 8192, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    return made


@contextmanager
def timed() -> Iterator[dict[str, float]]:
    """Add up the seconds of every step by its name; a step inside another counts for the outer."""
    seconds: dict[str, float] = defaultdict(float)
    running: list[str] = []

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            running.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                running.pop()
                if not running:
                    seconds[name] += time.perf_counter() - start

        return run

    with ExitStack() as stack:
        for name, (owner, attribute) in STEPS.items():
            function = watched(name, getattr(owner, attribute))
            stack.enter_context(mock.patch.object(owner, attribute, function))
        yield seconds


def measure(name: str, quick: bool, rounds: int) -> dict[str, Any]:
    """One row: the time of the steps and of a check beside a profile."""
    forget, retain = rows(0), rows(1)
    model = MODELS[name](make_model(quick))
    found: dict[str, list[float]] = {}
    for _ in range(rounds + 1):
        ours = copy.deepcopy(model)
        with timed() as seconds:
            start = time.perf_counter()
            gf.profile(
                ours, None, forget=forget, retain=retain, objectives=OBJECTIVES, engine="reverse"
            )
            whole = time.perf_counter() - start
        start = time.perf_counter()
        verdict = gf.check(copy.deepcopy(model), None, data=forget, objectives=OBJECTIVES[:1])
        checked = time.perf_counter() - start
        assert verdict.exact
        parts = {step: seconds[step] for step in STEPS}
        for key, value in {"profile": whole, "check": checked, **parts}.items():
            found.setdefault(key, []).append(value)
    least = {key: min(values[1:]) for key, values in found.items()}  # the first warms up
    steps = sum(least[step] for step in STEPS)
    return {
        "model": name,
        "rows": ROWS,
        "length": LENGTH,
        "objectives": len(OBJECTIVES),
        "rounds": rounds,
        **{f"{key.replace(' ', '_')}_s": float(f"{value:.4g}") for key, value in least.items()},
        "verification_of_rest": float(f"{steps / (least['profile'] - steps):.3g}"),
        "check_of_profile": float(f"{least['check'] / least['profile']:.3g}"),
    }


def main() -> None:
    """Measure, print, and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model, prints only")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = []
    for name in MODELS:
        row = measure(name, args.quick, 1 if args.quick else args.rounds)
        found.append(row)
        steps = "  ".join(f"{step} {row[step.replace(' ', '_') + '_s']:.3f}" for step in STEPS)
        print(
            f"{name:18} profile {row['profile_s']:7.3f} s  ({steps})  verification "
            f"{100 * row['verification_of_rest']:.1f} % of the rest  check {row['check_s']:.3f} s, "
            f"{100 * row['check_of_profile']:.1f} % of the profile",
            flush=True,
        )
    if not args.quick:
        path = RESULTS / "check_cpu.csv"
        write_csv(path, found)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()

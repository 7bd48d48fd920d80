"""A whole unlearning study in minutes: invented authors, a model that knows them, a profile."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from geffect_fast.arguments import checked_config, make_config
from geffect_fast.data import SampleSet, make_batches, tokenize_rows, write_jsonl
from geffect_fast.data.batch import Batch
from geffect_fast.demo.authors import REFUSALS, make_fictitious_authors, split_forget
from geffect_fast.errors import (
    GEffectError,
    InputError,
    InterruptedRunError,
    UnfinishedError,
    reason_of,
)
from geffect_fast.evaluation_settings import EvaluateConfig
from geffect_fast.measure.execute import execute
from geffect_fast.measure.execute_evaluation import execute_evaluation
from geffect_fast.measure.models import quiet_transformers
from geffect_fast.paths import is_there
from geffect_fast.report import write_report
from geffect_fast.report.html.page import write_page
from geffect_fast.settings import ProfileConfig
from geffect_fast.storage.disk import folder_for, set_aside
from geffect_fast.storage.lock import locked
from geffect_fast.storage.manifest import files_below, note
from geffect_fast.storage.run_folder import PLAIN_FILES, check_free, open_run, own_files
from geffect_fast.terminal import progress_bar
from geffect_fast.training.execute import execute_unlearn
from geffect_fast.unlearn_settings import UnlearnConfig

if TYPE_CHECKING:
    import xarray as xr
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

OBJECTIVES = (
    "ga",
    "gd",
    "wga(alpha=1)",
    "npo(beta=0.1)",
    "tnpo(beta=4)",
    "wtnpo(beta=4, alpha=1.5)",
    "po",
    "dpo(beta=0.1)",
    "simnpo(beta=4.5)",
    "rmu(layer=2)",
    "npo(beta=0.1) + kl",
)
RANGES = (
    "ga",
    "wga(alpha=0.1:7:20)",
    "npo(beta=0.01:4:20,log)",
    "tnpo(beta=0.1:5:20)",
    "simnpo(beta=0.1:5:20)",
)
UNLEARNED = {"ga": "ga", "wga": "wga(alpha=1)", "npo": "npo(beta=0.1)", "gd": "gd"}
"""What the model is unlearned with, by folder."""
SWEEP = "sweep"
STEPS = "steps"
PAGE = "report.html"
MEASURES = "measures"
ASKED = "retain_asked.jsonl"
"""The retain rows that are measured of the unlearned models."""
PARTS = (
    *("forget.jsonl", "retain.jsonl", ASKED, "refusals.jsonl", "reference", "model"),
    *(SWEEP, STEPS, MEASURES),
)
METRICS = ("probability", "rouge_l", "extraction_strength", "truth_ratio")
"""What is measured of what the model was unlearned to, beside the effects before."""
ASKED_EVERY = 4
"""A part of the retain rows is measured, so that the table takes less than a minute."""
PEAK_RATE = 1e-3
UNLEARN_RATE = 1e-4
KEPT = 0.93
"""Unlearning begins with steps until so much of the forget set's mean token probability is left."""
END = "<|end|>"


@dataclass(frozen=True)
class Size:
    """How large the demo is.

    Attributes:
        n_authors: invented authors, ten questions each.
        vocab_size, hidden, n_layers: of the Llama.
        known: share of answers that must be reproduced word for word before training ends.
        max_epochs: after which training gives up.
        n_updates: of unlearning, with each objective.
    """

    n_authors: int = 20
    vocab_size: int = 1024
    hidden: int = 256
    n_layers: int = 4
    known: float = 0.99
    max_epochs: int = 80
    n_updates: int = 12


def run_demo(
    out: str | Path,
    *,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
    size: Size | None = None,
) -> xr.Dataset:
    """Make data, train a model on it until it knows it by heart, profile objectives and sweep them.

    Args:
        out: gets `forget.jsonl`, `retain.jsonl`, `refusals.jsonl`, `reference/` (the model that
            knows all), `model/` (it, a few unlearning steps later), the run, in `sweep/` that of a
            sweep, by token, in `steps/` those of unlearning with four objectives, with a page that
            compares them, and in `measures/` an evaluation of the four models beside the effects
            at the one before; where anything fails, it is left as it was.
        seed: of data, weights and order.
        overwrite: whether an earlier demo in `out` may be replaced.
        progress: whether to show bars and say what happens.
        size: how large; None: what two cores train in two minutes.

    Returns:
        The result, as `geffect_fast.profile` returns it; that of the sweep is in its folder.

    Raises:
        InputError: `out` is in use.
        GEffectError: the model did not learn its data.
    """
    size = size or Size()
    unmade: list[UnfinishedError] = []
    with locked(out) as folder, folder_for(f"demo {out}", folder):
        check_free(out, overwrite)
        _check_parts(out, folder, overwrite)
        result = _run_demo(folder, own_files(folder), seed, progress, size, unmade)
    if unmade:
        raise unmade[0]
    return result


def _check_parts(out: str | Path, folder: Path, overwrite: bool) -> None:
    """Raise `InputError` where something is in the way of a demo's data, models and runs."""
    own = own_files(folder)
    for part in PARTS:
        held = _part_files(folder, part)
        if theirs := [name for name in held if name not in own]:
            raise InputError(f"{out} holds {theirs[0]}, which no demo made; choose another --out")
        if is_there(folder / part) and not overwrite:
            raise InputError(f"{out} already holds {part}; choose another --out or use --overwrite")


def _part_files(folder: Path, part: str) -> list[str]:
    """The files of one of `PARTS` that are there, by path in the demo's folder."""
    if (folder / part).is_dir():
        return [f"{part}/{name}" for name in files_below(folder / part)]
    return [part] if is_there(folder / part) else []


def _run_demo(
    folder: Path,
    own: Collection[str],
    seed: int,
    progress: bool,
    size: Size,
    unmade: list[UnfinishedError],
) -> xr.Dataset:
    """All of a demo, in the place of an earlier one's files `own`.

    Plots and pages that could not be made are added to `unmade`.
    """
    outside = {name for name in own if Path(name).parts[0] not in PARTS}
    with set_aside(folder, {*outside, *PARTS, *PLAIN_FILES}):
        values = _prepare(folder, seed, progress, size)
        profiled = make_config(values | {"objectives": OBJECTIVES})
        result = _execute(profiled, folder, progress, unmade)
        swept = {"command": "sweep", "objectives": RANGES, "resolve": ("sample", "token")}
        _execute(make_config(values | swept), folder / SWEEP, progress, unmade)
        with torch.random.fork_rng(devices=[]):  # transformers' Trainer sets the seed for good
            runs = _unlearn(folder, values, progress, size)
            _measure(folder, progress, unmade)
        try:
            write_page(runs, folder / STEPS / PAGE)
        except Exception as error:  # as `write_report`
            unmade.append(
                UnfinishedError(
                    f"the demo in {folder} is whole, but {PAGE} could not be made "
                    f"({reason_of(error)}); geffect-fast report {folder / STEPS}/* --out FILE "
                    "writes one"
                )
            )
        note(folder, *(name for part in PARTS for name in _part_files(folder, part)))
        return result


def _execute(
    config: ProfileConfig, folder: Path, progress: bool, unmade: list[UnfinishedError]
) -> xr.Dataset:
    """A profile or sweep of a demo; what its report lacks is added to `unmade`."""
    try:
        return execute(config, folder, progress=progress, report=write_report)
    except UnfinishedError as error:
        unmade.append(error)
        return open_run(folder, lazy=True)
    except InterruptedRunError:  # nothing of a demo is kept
        raise KeyboardInterrupt from None


def _unlearn(
    folder: Path, values: dict[str, Any], progress: bool, size: Size
) -> dict[str, xr.Dataset]:
    """Unlearn what the reference knows with each of four objectives; the results by objective."""
    if progress:
        print(f"Unlearned with {', '.join(UNLEARNED.values())} is the model that knows them all.")
    runs = {}
    for name, objective in UNLEARNED.items():
        config = checked_config(
            UnlearnConfig,
            {
                **{field: values[field] for field in ("forget", "retain")},
                **{"model": values["reference"], "objective": objective, "steps": size.n_updates},
                **{"probe_every": 2, "probe_rows": 12, "learning_rate": UNLEARN_RATE},
            },
        )
        try:
            runs[objective] = execute_unlearn(config, folder / STEPS / name, progress=progress)
        except InterruptedRunError:  # nothing of a demo is kept to go on with
            raise KeyboardInterrupt from None
        except UnfinishedError as error:
            raise InputError(f"{str(error).partition(';')[0]}; free some space") from error
    return runs


def _measure(folder: Path, progress: bool, unmade: list[UnfinishedError]) -> None:
    """Evaluate the four unlearned models and the one before, beside the effects there.

    What its report lacks is added to `unmade`.
    """
    config = checked_config(
        EvaluateConfig,
        {
            "against_effects": [str(folder / STEPS / name) for name in UNLEARNED],
            "forget": str(folder / "forget.jsonl"),
            "retain": str(folder / ASKED),
            "metrics": [name for name in METRICS if name != "rouge_l" or find_spec("rouge_score")],
            "max_new_tokens": 32,
        },
    )
    if progress:
        print("Measured is what the four unlearned models know still.", flush=True)
    try:
        execute_evaluation(config, folder / MEASURES, progress=progress, report=write_report)
    except UnfinishedError as error:
        unmade.append(error)
    except InterruptedRunError:  # nothing of a demo is kept
        raise KeyboardInterrupt from None


def _prepare(folder: Path, seed: int, progress: bool, size: Size) -> dict[str, Any]:
    """Fill the folder with data and models; the fields of a config that name them."""
    rows = make_fictitious_authors(size.n_authors, seed)
    forget, retain = split_forget(rows, 0.2)
    write_jsonl(forget, folder / "forget.jsonl")
    write_jsonl(retain, folder / "retain.jsonl")
    write_jsonl(retain[::ASKED_EVERY], folder / ASKED)
    write_jsonl(({"refusal": refusal} for refusal in REFUSALS), folder / "refusals.jsonl")

    def say(text: str) -> None:
        if progress:
            print(text, flush=True)

    say(f"{len(rows)} questions about {size.n_authors} invented authors, {len(forget)} to forget.")
    tokenizer = train_tokenizer([f"{r['question']} {r['answer']}" for r in rows], size.vocab_size)
    sets = [tokenize_rows(part, tokenizer, name="demo") for part in (forget, retain)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make_model(tokenizer, size)
    n_parameters = sum(p.numel() for p in model.parameters())
    epochs = memorise(model, sets, size, seed, progress)
    knowledge = [recall(model, part) for part in sets]
    say(
        f"A Llama of {n_parameters / 1e6:.1f} million parameters knows them by heart after "
        f"{epochs} epochs: {_percent(knowledge)} (to forget, to retain)."
    )
    save(model, tokenizer, folder / "reference")
    steps = start_unlearning(model, sets[0], progress)
    save(model, tokenizer, folder / "model")
    say(
        f"Profiled is that model after {steps} steps of gradient ascent on the forget set "
        f"({_percent([recall(model, part) for part in sets])}) with the one before as reference, "
        "since at the reference itself npo is ga on another scale and kl has no gradient."
    )
    return {
        "model": str(folder / "model"),
        "reference": str(folder / "reference"),
        "forget": str(folder / "forget.jsonl"),
        "retain": str(folder / "retain.jsonl"),
        "refusals": str(folder / "refusals.jsonl"),
    }


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer trained on `texts`; it can write any text."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts, vocab_size=vocab_size, min_frequency=2, special_tokens=[END], show_progress=False
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END)


def make_model(tokenizer: PreTrainedTokenizerBase, size: Size) -> LlamaForCausalLM:
    """A Llama of the given size with random weights, in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    end = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=4 * size.hidden,
        num_hidden_layers=size.n_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )
    model = LlamaForCausalLM(config).eval()
    # at the 0.02 of all other weights, the norm after the embeddings would blow their gradient up
    # until next to nothing of the effect sat elsewhere
    nn.init.normal_(model.model.embed_tokens.weight, std=0.1)
    return model


def memorise(model: nn.Module, sets: list[SampleSet], size: Size, seed: int, progress: bool) -> int:
    """Train until `size.known` of the answers are reproduced word for word.

    Returns:
        Epochs it took.

    Raises:
        GEffectError: `size.max_epochs` were not enough.
    """
    order = random.Random(seed)
    samples = [sample for part in sets for sample in part.samples]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.0
    )
    with progress_bar(progress, "learning by heart", 1.0) as show:
        for epoch in range(1, size.max_epochs + 1):
            order.shuffle(samples)
            seen = []
            batches = make_batches(SampleSet("demo", tuple(samples)), ("answer",), token_budget=512)
            for batch in batches:
                logprob, right = _predict(model, batch)
                (-logprob.mean()).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                seen.append(right.float().mean())
            share = float(torch.stack(seen).mean())
            show(completed=share)
            # smaller steps as less is left to learn
            optimizer.param_groups[0]["lr"] = PEAK_RATE * min(1.0, max(0.1, 5 * (1 - share)))
            if share >= size.known and all(recall(model, s)[1] >= size.known for s in sets):
                return epoch
    raise GEffectError(f"the demo's model did not learn its data in {size.max_epochs} epochs")


def start_unlearning(model: nn.Module, forget: SampleSet, progress: bool) -> int:
    """Ascend the loss of the forget set until `KEPT` of its tokens' mean probability is left.

    Returns:
        Steps it took.

    Raises:
        GEffectError: the probability did not fall.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03)
    batches = make_batches(forget, ("answer",), token_budget=512)
    target = KEPT * recall(model, forget)[0]
    seen: list[float] = []
    with progress_bar(progress, "first steps of unlearning", 1.0) as show:
        for step in range(1, 1001):
            logprob, _ = _predict(model, batches[step % len(batches)])
            logprob.mean().backward()
            # steps of equal length: the gradient of what is known by heart is tiny
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seen.append(float(logprob.detach().exp().mean()))
            probability = sum(seen[-len(batches) :]) / len(batches)
            if len(seen) < len(batches):
                continue
            show(completed=(1 - probability) / (1 - target))
            if probability <= target:
                return step
    raise GEffectError("the demo's model did not begin to forget in 1000 steps")


@torch.no_grad()
def recall(model: nn.Module, samples: SampleSet) -> tuple[float, float]:
    """How well answers are known: mean token probability, share reproduced word for word.

    An answer counts as reproduced where each of its tokens is the likeliest after those before it,
    which is when greedy decoding writes it.
    """
    probabilities, reproduced = [], []
    for batch in make_batches(samples, ("answer",), token_budget=2048):
        logprob, right = _predict(model, batch)
        probabilities.append(logprob.exp())
        wrong = torch.zeros(batch.total_tokens)
        wrong[batch.target_index] = (~right).float()
        reproduced.append(batch.sample_sum(wrong, batch.target_mask()) == 0)
    return float(torch.cat(probabilities).mean()), float(torch.cat(reproduced).float().mean())


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Model and tokenizer as a folder that transformers loads."""
    from safetensors import SafetensorError

    with quiet_transformers():
        try:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        except SafetensorError as error:  # what a full disk is to it
            raise OSError(str(error)) from error


def _predict(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of every target token, and whether it is the likeliest."""
    index = batch.target_index
    outputs = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    logprob = outputs.logits.reshape(batch.total_tokens, -1)[index].float().log_softmax(-1)
    target = batch.targets[index]
    return logprob.gather(1, target[:, None]).squeeze(1), logprob.argmax(-1) == target


def _percent(knowledge: list[tuple[float, float]]) -> str:
    probability = ", ".join(f"{p:.2f}" for p, _ in knowledge)
    share = ", ".join(f"{100 * s:.0f} %" for _, s in knowledge)
    return f"mean token probability {probability}; reproduced word for word {share}"

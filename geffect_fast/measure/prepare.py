"""What every command does before it measures: read, tokenise and check, once."""

from __future__ import annotations

import functools
import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import nn

from geffect_fast.capture.compat import (
    check_finite,
    check_is_model,
    mixing_module,
    still_up_to,
)
from geffect_fast.data import (
    SampleSet,
    check_vocabulary,
    read_refusals,
    read_rows,
    tokenize_rows,
)
from geffect_fast.data.samples import check_positions
from geffect_fast.data.tokenize import TEXT_WINDOW
from geffect_fast.errors import GEffectWarning, InputError, UnsupportedModelError
from geffect_fast.measure.models import load_model
from geffect_fast.objectives import Objective, parse_list
from geffect_fast.objectives import resolve as resolve_objective
from geffect_fast.objectives.base import REFERENCE_NEEDS, WEIGHTS, Need, required
from geffect_fast.results.dataset import digests
from geffect_fast.settings import Reading

ReadingT = TypeVar("ReadingT", bound=Reading)


@dataclass(frozen=True)
class Sources:
    """Data sets as users give them: a path, a hub id, rows, or samples that are tokenised already.

    Attributes:
        sets: by name; the first is what must go.
        refusals: answers in place of the first set's, for objectives that read alternatives.
    """

    sets: Mapping[str, Any]
    refusals: Any = None

    @classmethod
    def of(
        cls, forget: Any, retain: Any, probes: Mapping[str, Any] | None, refusals: Any
    ) -> Sources:
        """Of a command's arguments; raise `InputError` where a probe has the name of another."""
        if not isinstance(probes, Mapping | None):
            raise InputError(
                f"probes: got {type(probes).__name__}; give a dict of data sets by name"
            )
        sets = {"forget": forget, "retain": retain}
        for name, source in (probes or {}).items():
            if name in (*sets, "unlearn"):
                raise InputError(f"probes: the name '{name}' is taken; choose another")
            sets[name] = source
        return cls(sets, refusals)

    def arguments(self) -> dict[str, Any]:
        """Again as arguments of a command."""
        probes = {name: s for name, s in self.sets.items() if name not in ("forget", "retain")}
        named = {name: self.sets[name] for name in ("forget", "retain")}
        return named | {"probes": probes, "refusals": self.refusals}

    @property
    def has_text(self) -> bool:
        """Whether a tokenizer is needed, of sources that are read."""
        return any(
            not isinstance(rows, SampleSet) and "input_ids" not in rows[0]
            for rows in self.sets.values()
        )


def read_sources(
    sources: Sources,
    objectives: Sequence[Objective],
    data_format: str,
    tell: Callable[[str], None] | None = None,
) -> Sources:
    """The rows of all data sets, checked to have what objectives need; no model is needed.

    Args:
        sources: read or not.
        objectives: of the command.
        data_format: of files, as of `read_rows`.
        tell: is told in a line a set what was found.

    Raises:
        InputError: a set cannot be read, or lacks refusals or weights that an objective needs.
    """
    sets = {
        name: source
        if isinstance(source, SampleSet)
        else read_rows(source, name=name, data_format=data_format, tell=tell)
        for name, source in sources.sets.items()
    }
    refusals = None if sources.refusals is None else read_refusals(sources.refusals)
    forget = next(iter(sets.values()))
    if isinstance(forget, SampleSet):
        has_alternatives, has_weights = forget.has_alternatives, forget.has_weights
    else:
        has_alternatives = all(row.get("alternative") for row in forget) or refusals is not None
        has_weights = "weights" in forget[0]
    if not has_alternatives:
        _check_needs_no_refusals(objectives)
    if not has_weights:
        for objective in objectives:
            if any("weights" in part.needs for _, part in objective.parts()):
                required(objective, None, WEIGHTS)
    return Sources(sets, refusals)


@dataclass(frozen=True)
class Prepared(Generic[ReadingT]):
    """A model, its data and objectives, read, tokenised and checked.

    Attributes:
        model, tokenizer: as given.
        settings: how rows were read, and what else the command takes.
        objectives: each once.
        sets: by name, as in `Sources`, tokenised.
        reference: what NPO-like objectives compare with; None: the model itself.
    """

    model: nn.Module
    tokenizer: Any
    settings: ReadingT
    objectives: list[Objective]
    sets: dict[str, SampleSet]
    reference: nn.Module | None = field(repr=False)

    @functools.cached_property
    def parts(self) -> list[Objective]:
        """What objectives are sums of, each once: effects are linear in the objective."""
        return parts_of(self.objectives)

    @property
    def needs(self) -> set[Need]:
        """What the parts need of a batch."""
        return needs_of(self.parts)

    @property
    def reads_alternatives(self) -> bool:
        """Whether a part reads refusals."""
        return any("alternative" in part.roles for part in self.parts)

    @property
    def compares(self) -> bool:
        """Whether a part reads a reference model."""
        return bool(REFERENCE_NEEDS & self.needs)

    def attributes(self) -> dict[str, Any]:
        """Attributes of a result that say of what objectives and rows it is."""
        return {
            "n_forget": len(self.sets["forget"]),
            "n_retain": len(self.sets["retain"]),
            "date": self.settings.date,
            "digests": json.dumps(digests(self.sets)),
            "objectives": json.dumps(
                [{"name": o.name, "parameters": o.parameters()} for o in self.objectives]
            ),
        }

    def of_rows(self, rows: Mapping[str, Sequence[int]]) -> Prepared[ReadingT]:
        """The same of some rows of each set."""
        sets = {name: self.sets[name].part(chosen) for name, chosen in rows.items()}
        return replace(self, sets=sets)


def prepare(
    model: nn.Module,
    tokenizer: Any,
    sources: Sources,
    objectives: Sequence[Objective],
    settings: ReadingT,
    reference_model: nn.Module | str | Path | None = None,
) -> Prepared[ReadingT]:
    """Read, tokenise and check what a command measures.

    Args:
        model: a causal language model of transformers.
        tokenizer: of transformers; None for samples that are tokenised already.
        sources: data sets, read or not.
        objectives: each once, as `resolved_list` returns them.
        settings: how rows become tokens, and what else the command takes.
        reference_model: a model or the folder of one; loaded where an objective compares with it.

    Raises:
        InputError: unusable data, model or reference, in one line.
        NonFiniteError: a weight is not finite.
    """
    sources = read_sources(sources, objectives, settings.data_format)
    parts = parts_of(objectives)
    alternatives = any("alternative" in part.roles for part in parts)
    first = next(iter(sources.sets))
    sets = {
        name: rows
        if isinstance(rows, SampleSet)
        else tokenize_rows(
            rows,
            tokenizer,
            name=name,
            refusals=sources.refusals if name == first and alternatives else None,
            template=settings.template,
            max_length=settings.max_length,
            date=settings.date,
            n_positions=table_of_positions(model),
            window=min(TEXT_WINDOW, made_for_positions(model) or TEXT_WINDOW),
        )
        for name, rows in sources.sets.items()
    }
    check_model(model, sets)
    if alternatives:
        _check_pairs(model, sets[first])
    reference = None
    if needs_of(parts) & REFERENCE_NEEDS and reference_model not in (None, model):
        reference = _reference(reference_model, model, settings.trust_remote_code)
        check_model(reference, sets, "reference_model")
    return Prepared(model, tokenizer, settings, list(objectives), sets, reference)


def resolved_list(specs: Sequence[str | Objective] | str) -> list[Objective]:
    """The objectives that are meant; raise `InputError` where there is none, or one twice."""
    if isinstance(specs, Objective) or not isinstance(specs, Iterable):
        raise InputError(f"objectives: got {specs}; give a list, such as ['ga', 'npo(beta=0.1)']")
    listed = parse_list(specs) if isinstance(specs, str) else [resolve_objective(s) for s in specs]
    if not listed:
        raise InputError("objectives: the list is empty; give at least one, such as 'ga'")
    seen: dict[Objective, Objective] = {}
    for objective in listed:
        first = seen.get(objective)
        if first is not None:
            raise InputError(f"objectives: '{objective}' is the same as '{first}'; give it once")
        seen[objective] = objective
    return listed


def check_count(name: str, count: Any) -> None:
    """Raise `InputError` at an argument that is no whole number of at least 1."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InputError(f"{name}: must be a whole number of at least 1, got {count!r}")


def parts_of(objectives: Sequence[Objective]) -> list[Objective]:
    """What objectives are sums of, each once."""
    return list(dict.fromkeys(part for o in objectives for _, part in o.parts()))


def needs_of(parts: Sequence[Objective]) -> set[Need]:
    """What parts of objectives need of a batch."""
    return {need for part in parts for need in part.needs}


def _check_needs_no_refusals(objectives: Sequence[Objective]) -> None:
    """Raise `InputError` naming the first objective that needs refusals: there are none."""
    for objective in objectives:
        if any("alternative" in part.roles for _, part in objective.parts()):
            raise InputError(
                f"objective '{objective}' needs refusals: give a file, one a line, as `refusals` "
                "(--refusals FILE), or an `alternative` in every forget row"
            )


def _reference(
    source: nn.Module | str | Path, model: nn.Module, trust_remote_code: bool
) -> nn.Module:
    """The reference model, loaded where a folder is given, as exact and where the model is."""
    if isinstance(source, nn.Module):
        why = mixing_module(source)
        if why is not None:
            raise InputError(f"reference_model: {why}")
        return source
    first = next(model.parameters())
    dtype, device = str(first.dtype).removeprefix("torch."), str(first.device)
    return load_model(source, dtype, device, "reference", trust_remote_code=trust_remote_code)


def check_model(model: nn.Module, sets: Mapping[str, SampleSet], what: str = "model") -> None:
    """Raise where a model is none, no decoder alone, holds NaN, or is too small for the data sets.

    Too small are vocabularies that lack a token, and tables of positions that samples run out of.
    """
    check_is_model(model, what)
    check_finite(model, what)
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) is True:
        raise InputError(
            f"{what}: {type(model).__name__} reads the question by an encoder and the answer by a "
            "decoder; give a causal language model, which reads both as one text"
        )
    config = getattr(config, "get_text_config", lambda: config)()
    vocab_size = getattr(config, "vocab_size", None)
    for sample_set in sets.values():
        if isinstance(vocab_size, int):
            check_vocabulary(sample_set, vocab_size, what)
    n_positions, table = made_for_positions(model), table_of_positions(model)
    if table is not None:
        for sample_set in sets.values():
            check_positions(sample_set, table, what)
    elif n_positions is not None:
        _tell_of_long_rows(sets, n_positions, what)


def _check_pairs(model: nn.Module, sample_set: SampleSet) -> None:
    """Refuse sequences of a sample that have frequencies of their own, as objectives read them.

    They share a forward, in which the shorter ones are extended to the longest.

    Raises:
        UnsupportedModelError: naming the first row.
    """
    still = still_up_to(model)
    for sample in sample_set.samples if still < math.inf else ():
        lengths = {len(q) for sequences in sample.sequences().values() for q in sequences}
        if len(lengths) > 1 and max(lengths) > still:
            raise UnsupportedModelError(
                f"{sample.place(sample_set.name)}: its answer and alternatives have "
                f"{min(lengths)} to {max(lengths)} tokens, and beyond {still:.0f} the model's "
                f"rotary frequencies follow the length; give max_length={still:.0f}, or leave out "
                "objectives that read alternatives"
            )


def _tell_of_long_rows(sets: Mapping[str, SampleSet], n_positions: int, what: str) -> None:
    """A warning that names the first row beyond the positions that a model was made for."""
    for sample_set in sets.values():
        for sample in sample_set.samples:
            longest = max(len(q) for qs in sample.sequences().values() for q in qs)
            if longest > n_positions:
                warnings.warn(
                    f"{sample.place(sample_set.name)} has {longest} tokens, and the "
                    f"{what} was made for {n_positions} positions; what it computes beyond them "
                    "may mean little",
                    GEffectWarning,
                    stacklevel=2,
                )
                return


def made_for_positions(model: nn.Module) -> int | None:
    """The positions that a model's config speaks of; XLNet's -1 are as many as one likes."""
    config = getattr(model, "config", None)
    config = getattr(config, "get_text_config", lambda: config)()
    n_positions = getattr(config, "max_position_embeddings", None)
    return n_positions if isinstance(n_positions, int) and n_positions > 0 else None


def table_of_positions(model: nn.Module) -> int | None:
    """Rows of a model's table of positions, which some make a few longer; None without one."""
    n_positions = made_for_positions(model)
    if n_positions is None or not isinstance(model, nn.Module):
        return None
    tokens = getattr(model, "get_input_embeddings", lambda: None)()
    found = any(
        isinstance(module, nn.Embedding)
        and module is not tokens
        and 0 <= module.num_embeddings - n_positions < 8
        for module in model.modules()
    )
    return n_positions if found else None

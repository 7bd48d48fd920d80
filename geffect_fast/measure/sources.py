"""A command's data sets and objectives, read, parsed and checked before a model is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from geffect_fast.data import SampleSet, read_refusals, read_rows
from geffect_fast.errors import InputError
from geffect_fast.objectives import Objective, parse_list
from geffect_fast.objectives import resolve as resolve_objective
from geffect_fast.objectives.base import WEIGHTS, Need, required


@dataclass(frozen=True)
class Sources:
    """Data sets as users give them: a path, a hub id, rows, or samples that are tokenised already.

    Attributes:
        sets: the data sets by name; the first holds what must go.
        refusals: answers in place of the first set's, for objectives that read alternatives.
    """

    sets: Mapping[str, Any]
    refusals: Any = None

    @classmethod
    def of(
        cls, forget: Any, retain: Any, probes: Mapping[str, Any] | None, refusals: Any
    ) -> Sources:
        """Make sources of a command's arguments.

        Raises:
            InputError: `probes` is no dict, or a probe has a name that is taken.
        """
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
        """The sources as keyword arguments of a command."""
        probes = {name: s for name, s in self.sets.items() if name not in ("forget", "retain")}
        named = {name: self.sets[name] for name in ("forget", "retain")}
        return named | {"probes": probes, "refusals": self.refusals}

    @property
    def has_text(self) -> bool:
        """Whether a set holds text, which needs a tokenizer; the sets must have been read."""
        return any(
            not isinstance(rows, SampleSet) and "input_ids" not in rows[0]
            for rows in self.sets.values()
        )


def read_sets(
    sources: Mapping[str, Any], data_format: str, tell: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Rows by name; sets that are tokenised already, or None, stay as they are.

    Args:
        sources: data sets as users give them, by name.
        data_format, tell: as `read_rows` takes them.

    Raises:
        InputError: a set cannot be read.
    """
    return {
        name: source
        if isinstance(source, SampleSet | None)
        else read_rows(source, name=name, data_format=data_format, tell=tell)
        for name, source in sources.items()
    }


def read_sources(
    sources: Sources,
    objectives: Sequence[Objective],
    data_format: str,
    tell: Callable[[str], None] | None = None,
) -> Sources:
    """Read the rows of all data sets, and check that they have what objectives need.

    Args:
        sources: read or not.
        objectives: of the command.
        data_format: of files, as `read_rows` takes it.
        tell: receives a line for each set that says what was found.

    Raises:
        InputError: a set cannot be read, or lacks refusals or weights that an objective needs.
    """
    sets = read_sets(sources.sets, data_format, tell)
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


def resolved_list(specs: Sequence[str | Objective] | str) -> list[Objective]:
    """The objectives of a list or a string.

    Raises:
        InputError: there is none, or the same objective is given twice.
    """
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
    """Raise `InputError` where an argument is not a whole number of at least 1."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InputError(f"{name}: must be a whole number of at least 1, got {count!r}")


def parts_of(objectives: Sequence[Objective]) -> list[Objective]:
    """The elementary objectives that the given ones are weighted sums of, each once."""
    return list(dict.fromkeys(part for o in objectives for _, part in o.parts()))


def needs_of(parts: Sequence[Objective]) -> set[Need]:
    """Everything that one of the parts needs of a batch."""
    return {need for part in parts for need in part.needs}


def reads_alternatives(parts: Sequence[Objective]) -> bool:
    """Whether one of the parts reads alternatives: refusals, or a row's own."""
    return any("alternative" in part.roles for part in parts)


def _check_needs_no_refusals(objectives: Sequence[Objective]) -> None:
    """Raise `InputError` naming the first objective that needs refusals, since none are given."""
    for objective in objectives:
        if reads_alternatives(parts_of([objective])):
            raise InputError(
                f"objective '{objective}' needs refusals: give a file, one a line, as `refusals` "
                "(--refusals FILE), or an `alternative` in every forget row"
            )

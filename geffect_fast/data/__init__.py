"""Data sets: reading, tokenising, and packing into batches without padding."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from geffect_fast.data.batch import IGNORE, REDUCTIONS, Batch, Reduction, Role, Totals
    from geffect_fast.data.containers import write_jsonl
    from geffect_fast.data.packing import LAYOUTS, Layout, make_batches, token_places
    from geffect_fast.data.row_kinds import RowKind, row_kind
    from geffect_fast.data.rows import read_refusals, read_rows
    from geffect_fast.data.samples import Sample, SampleSet, TokenSequence, check_vocabulary
    from geffect_fast.data.samples import TokenSequence as Sequence  # its earlier name
    from geffect_fast.data.token_budget import estimate_token_budget
    from geffect_fast.data.tokenize import tokenize_choices, tokenize_rows

# Imports are lazy: commands read files without torch, which most modules of this package load.
_PLACES = {
    **dict.fromkeys(("IGNORE", "REDUCTIONS", "Batch", "Reduction", "Role", "Totals"), "batch"),
    "write_jsonl": "containers",
    **dict.fromkeys(("LAYOUTS", "Layout", "make_batches", "token_places"), "packing"),
    **dict.fromkeys(("RowKind", "row_kind"), "row_kinds"),
    **dict.fromkeys(("read_refusals", "read_rows"), "rows"),
    **dict.fromkeys(("Sample", "SampleSet", "TokenSequence", "check_vocabulary"), "samples"),
    "estimate_token_budget": "token_budget",
    **dict.fromkeys(("tokenize_choices", "tokenize_rows"), "tokenize"),
}

__all__ = [
    "IGNORE",
    "LAYOUTS",
    "REDUCTIONS",
    "Batch",
    "Layout",
    "Reduction",
    "Role",
    "RowKind",
    "Sample",
    "SampleSet",
    "Sequence",
    "TokenSequence",
    "Totals",
    "check_vocabulary",
    "estimate_token_budget",
    "make_batches",
    "read_refusals",
    "read_rows",
    "row_kind",
    "token_places",
    "tokenize_choices",
    "tokenize_rows",
    "write_jsonl",
]


def __getattr__(name: str) -> Any:
    attribute = "TokenSequence" if name == "Sequence" else name
    if attribute not in _PLACES:
        raise AttributeError(f"module 'geffect_fast.data' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[attribute]}"), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

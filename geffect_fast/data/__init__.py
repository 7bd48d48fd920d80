"""Data sets: reading, tokenising, and packing into batches without padding."""

from geffect_fast.data.batch import IGNORE, REDUCTIONS, Batch, Reduction, Role, Totals
from geffect_fast.data.containers import write_jsonl
from geffect_fast.data.packing import LAYOUTS, Layout, make_batches, token_places
from geffect_fast.data.row_kinds import RowKind, row_kind
from geffect_fast.data.rows import read_refusals, read_rows
from geffect_fast.data.samples import Sample, SampleSet, TokenSequence, check_vocabulary
from geffect_fast.data.token_budget import estimate_token_budget
from geffect_fast.data.tokenize import tokenize_choices, tokenize_rows

Sequence = TokenSequence
"""The name it had before."""

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

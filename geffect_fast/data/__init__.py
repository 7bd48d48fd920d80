"""Question-answer sets: reading, tokenising, and packing into batches without padding."""

from geffect_fast.data.batch import IGNORE, REDUCTIONS, Batch, Reduction, Role, Totals
from geffect_fast.data.fictitious import (
    REFUSALS,
    make_fictitious_authors,
    split_forget,
    write_jsonl,
)
from geffect_fast.data.packing import (
    LAYOUTS,
    Layout,
    make_batches,
    token_places,
)
from geffect_fast.data.qa import read_refusals, read_rows
from geffect_fast.data.token_budget import estimate_token_budget
from geffect_fast.data.tokenize import (
    Sample,
    SampleSet,
    Sequence,
    check_vocabulary,
    tokenize_rows,
)

__all__ = [
    "IGNORE",
    "LAYOUTS",
    "REDUCTIONS",
    "REFUSALS",
    "Batch",
    "Layout",
    "Reduction",
    "Role",
    "Sample",
    "SampleSet",
    "Sequence",
    "Totals",
    "check_vocabulary",
    "estimate_token_budget",
    "make_batches",
    "make_fictitious_authors",
    "read_refusals",
    "read_rows",
    "split_forget",
    "token_places",
    "tokenize_rows",
    "write_jsonl",
]

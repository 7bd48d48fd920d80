"""Data that cannot be read, holds no questions and answers, or does not fit the model."""

from __future__ import annotations

import torch
from bad_input.case import (
    Case,
    both,
    check,
    cut,
    gone,
    holds,
    line,
    patched,
    profile,
    row,
    rows,
    settings,
    tokens,
)
from models import build, samples

import geffect_fast as gf

GOOD_ROW = {"question": "Who?", "answer": "She."}
TOKENISED = profile(refusals=None)


def call(make=lambda: build("llama"), **changes):
    """`gf.profile` of the model that `make` makes, with some arguments changed."""
    good = {"forget": samples([5, 9], 1), "retain": samples([7], 2), "objectives": ["ga"]}
    return lambda _here: gf.profile(make(), None, **(good | changes))


class Listed(torch.utils.data.Dataset):
    """A torch Dataset of any given rows."""

    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def chat_template(text):
    """Replace the tokenizer's chat template."""
    return holds("model/chat_template.jinja", text)


CASES = [
    Case(
        "a field twice in a row",
        profile(),
        "forget.jsonl' is unusable JSON (its field 'answer' comes twice",
        "keep one",
        line("forget.jsonl", 2, '{"question": "q", "answer": "a", "answer": "b"}'),
    ),
    Case(
        "a field twice in an array",
        profile(retain="retain.json"),
        "its field 'question' comes twice",
        "keep one",
        holds("retain.json", '[{"question": "q", "question": "p", "answer": "a"}]'),
    ),
    Case(
        "a chat template that loops for years",
        profile(),
        "forget: row 0 (counting from 0), answer, does not fit the tokenizer's chat template (it",
        "give template=",
        both(
            chat_template("{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3),
            lambda _here, patch: patch.setattr("geffect_fast.data.chat_render.SECONDS", 0.5),
        ),
    ),
    Case(
        "a chat template that writes without end",
        check(),
        "chat template (it writes 99999000 characters)",
        "give template=",
        chat_template("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}"),
    ),
    Case(
        "an answer as long as a library",
        profile(max_length="1024"),
        "forget: row 1 (counting from 0), answer, has ",
        "more than 1024 (the model's positions, or max_length); shorten or drop the row",
        row(2, question="q", answer="a" * 1_000_000),
    ),
    Case(
        "no day",
        profile(date="tomorrow"),
        "--date: 'tomorrow' must be a day such as '2024-07-26'",
        "such as",
    ),
    # ---- files ----
    Case("forget missing", profile(forget="no/such.jsonl"), "'no/such.jsonl'", "give a file of"),
    Case("retain missing", profile(retain="none.json"), "retain: file 'none.json'", "give a file"),
    Case("probe missing", profile(probe="p=none.json"), "p: file 'none.json'", "give a file of"),
    Case("check's data missing", check(data="gone.jsonl"), "data: file 'gone.jsonl'", "give a"),
    Case(
        "refusals missing", profile(refusals="no.txt"), "refusals: file 'no.txt'", "one refusal a"
    ),
    Case("a folder as data", profile(forget="model"), "model' is a directory", "give a file of"),
    Case(
        "nothing as data",
        profile(forget=""),
        "--forget: must not be empty",
        "give a path or a hub id",
    ),
    Case(
        "no such hub id",
        profile(forget="nobody/nothing"),
        "'nobody/nothing'",
        "Hugging Face data set",
    ),
    Case(
        "no such hub id, with a split",
        profile(retain="nobody/nothing:main:train"),
        "'nobody/nothing:main:train'",
        "Hugging Face data set",
    ),
    Case(
        "a name longer than names may be",
        profile(forget="x" * 5000),
        "--forget: File name too long",
        "give a path",
    ),
    Case(
        "data that the disk cannot give", profile(forget="/proc/self/mem"), "/proc/self/mem", "give"
    ),
    Case(
        "data that may not be read",
        profile(),
        "forget.jsonl' (Permission denied)",
        "give a file of",
        patched("geffect_fast.data.files.packed_bytes", PermissionError(13, "Permission denied")),
    ),
    Case(
        "empty file",
        profile(),
        "forget.jsonl' holds no rows",
        "give at least",
        cut("forget.jsonl", 0),
    ),
    Case(
        "blank lines",
        profile(),
        "retain.jsonl' holds no rows",
        "give",
        holds("retain.jsonl", "\n \n"),
    ),
    Case(
        "empty array", profile(), "holds no rows", "give at least one", holds("forget.jsonl", "[]")
    ),
    Case(
        "refusals empty",
        profile(objectives="po"),
        "refusals.txt' holds none",
        "give at least one",
        cut("refusals.txt", 0),
    ),
    # ---- the rows of a file ----
    Case(
        "a line that is no JSON",
        profile(),
        "forget: line 3 of ",
        "put one JSON object on each line",
        line("forget.jsonl", 3, '{"question": '),
    ),
    Case(
        "a line that is no object",
        profile(),
        "line 2",
        "with 'question' and 'answer'",
        line("retain.jsonl", 2, "[1, 2]"),
    ),
    Case(
        "a torn array",
        profile(),
        "forget.jsonl' is malformed JSON (Expecting value, line 1 column 41",
        "mend the JSON",
        holds("forget.jsonl", '[{"question": "q", "answer": "a"},      '),
    ),
    Case(
        "JSON nested without end",
        profile(),
        "forget: line 1 of",
        "put one JSON object on each line",
        line("forget.jsonl", 1, '{"a":' * 100_000),
    ),
    Case(
        "not UTF-8",
        profile(),
        "forget: line 2 of",
        "save it as UTF-8",
        line("forget.jsonl", 2, '{"question": "Où?", "answer": "là"}'.encode("latin-1")),
    ),
    Case("a model as data", profile(forget="model/model.safetensors"), "safetensors", "JSON lines"),
    Case(
        "no question",
        profile(),
        "retain: line 2",
        "has no 'question'",
        row(2, "retain.jsonl", answer="a"),
    ),
    Case("no answer", profile(), "forget: line 1", "has no 'answer'", row(1, question="q")),
    Case(
        "blank question",
        profile(),
        "line 2",
        "'question' is empty; fill",
        row(2, question=" ", answer="a"),
    ),
    Case(
        "empty answer",
        profile(),
        "line 4",
        "'answer' is empty; fill it in",
        row(4, question="q", answer=""),
    ),
    Case(
        "an answer that is no text",
        profile(),
        "line 4",
        "make it a string",
        row(4, question="q", answer=7),
    ),
    Case(
        "half a surrogate pair",
        profile(),
        "line 1",
        "mend its encoding",
        row(1, question="q", answer="\ud800"),
    ),
    Case("too long", profile(max_length="5"), "forget: row 0", "or raise max_length"),
    Case("too long for a check", check("--max-length", "5"), "data: row 0", "or raise max_length"),
    Case(
        "no alternatives",
        profile(objectives="dpo", refusals=None),
        "objective 'dpo' needs refusals",
        "--refusals FILE",
    ),
    Case(
        "one row without an alternative",
        profile(objectives="ga+po", refusals=None),
        "objective 'ga + po' needs refusals",
        "`alternative` in every forget row",
        row(1, question="q", answer="a", alternative="b"),
    ),
    Case(
        "no alternatives for a check",
        check("--objectives", "po"),
        "objective 'po' needs refusals",
        "--refusals FILE",
    ),
    Case(
        "an empty list of alternatives",
        profile(objectives="po"),
        "line 1",
        "leave it out",
        row(1, question="q", answer="a", alternative=[]),
    ),
    Case(
        "a refusal that is no text",
        profile(objectives="po"),
        "refusals: line 1",
        "'refusal' is of type int; make it a string",
        holds("refusals.txt", '{"refusal": 3}'),
    ),
    # ---- tokens ----
    Case(
        "a token the model does not know",
        TOKENISED,
        "forget: row 1",
        "holds token id 9999, but the model knows",
        rows(tokens(5, 6), tokens(5, 9999), name="forget.jsonl"),
    ),
    Case(
        "fewer labels than tokens",
        TOKENISED,
        "forget: line 1",
        "3 'input_ids' but 2 'labels'; give one label a token",
        rows({"input_ids": [5, 6, 7], "labels": [-100, 6]}),
    ),
    Case(
        "no label to learn",
        TOKENISED,
        "forget: line 1",
        "label the answer's tokens",
        rows({"input_ids": [5, 6], "labels": [-100, -100]}),
    ),
    Case(
        "one token",
        TOKENISED,
        "forget: line 2",
        "label the answer's",
        rows(tokens(5, 6), tokens(7)),
    ),
    Case(
        "no tokens",
        TOKENISED,
        "forget: line 1",
        "leave the row out",
        rows({"input_ids": [], "labels": []}),
    ),
    Case("a negative token", TOKENISED, "holds -3", "token ids start at 0", rows(tokens(-3, 5))),
    Case(
        "a token that is no integer",
        TOKENISED,
        "'input_ids' holds type float",
        "give a flat list",
        rows({"input_ids": [0.5, 1], "labels": [-100, 1]}),
    ),
    Case("no labels", TOKENISED, "no 'labels'", "tokenised rows need", rows({"input_ids": [5, 6]})),
    Case(
        "padding",
        TOKENISED,
        "'attention_mask' marks padding",
        "drop the padded tokens",
        rows(tokens(5, 6, 0, attention_mask=[1, 1, 0])),
    ),
    Case("tokens and text", TOKENISED, "line 2", "use one kind", rows(tokens(5, 6), GOOD_ROW)),
    Case(
        "text without a tokenizer",
        profile(),
        "model: no tokenizer files",
        "--tokenizer",
        gone("model/tokenizer*"),
    ),
    # ---- templates ----
    Case(
        "no question in the template", profile(template="{answer}"), "'{answer}'", "hold {question}"
    ),
    Case(
        "no answer in the template",
        profile(template="{question}"),
        "'{question}'",
        "and {answer} once",
    ),
    Case(
        "a template that answers first",
        profile(template="{answer} {question}"),
        "template: '{answer} {question}'",
        "must put {question} before {answer}",
    ),
    Case(
        "a chat template that refuses",
        profile(),
        "forget: row 0",
        "give template='...{question}...{answer}'",
        settings("model/tokenizer_config.json", chat_template="{{ raise_exception('no') }}"),
    ),
    Case(
        "a chat template that loses the answer",
        profile(),
        "forget: row 0",
        "give template='...{question}...{answer}'",
        settings("model/tokenizer_config.json", chat_template="hello"),
    ),
    # ---- from Python ----
    Case("data of no rows", call(forget=[]), "forget: the data set holds no rows", "give at least"),
    Case("data that is a number", call(forget=7), "forget: got type int", "give a path or a list"),
    Case(
        "data by column",
        call(retain={"question": ["q"]}),
        "retain: got type dict",
        "a list of rows",
    ),
    Case(
        "a Dataset of pairs",
        call(forget=Listed(("q", "a"))),
        "row 0",
        "with 'question' and 'answer'",
    ),
    Case(
        "a Dataset of floats",
        call(retain=Listed({"input_ids": torch.rand(3), "labels": torch.rand(3)})),
        "retain: row 0",
        "give a flat list of ids",
    ),
    Case(
        "a Dataset of batches",
        call(forget=Listed(tokens(5, 6), {k: torch.ones(2, 3).long() for k in tokens()})),
        "forget: row 1",
        "give a flat list of ids",
    ),
    Case(
        "rows of text without a tokenizer",
        call(forget=[GOOD_ROW]),
        "forget: row 0 (counting from 0) is text",
        "give a tokenizer",
    ),
    Case(
        "too few tokenised refusals",
        call(objectives="po", refusals=[tokens(5, 6)]),
        "1 tokenised refusals for 2 rows",
        "give one a row",
    ),
    Case(
        "refusals as text for tokenised rows",
        call(objectives="po", refusals=["No."]),
        "forget: row 0",
        "give 'refusals' as input_ids and labels too",
    ),
    Case(
        "no refusal in a list", call(objectives="po", refusals=[]), "refusals", "give at least one"
    ),
    Case(
        "a template and a probe of no rows",
        call(probes={"general": []}),
        "general: the data set holds no rows",
        "give at least one",
    ),
    Case("probes without names", call(probes=[samples([4])]), "probes", "name"),
    Case("max_length 0", call(max_length=0), "max_length: should be", "greater than 0, got 0"),
    Case(
        "an unknown token in an alternative",
        profile(objectives="po", refusals=None),
        "its alternative holds token id 99999",
        "use its own tokenizer",
        rows(tokens(5, 6, alternative=tokens(7, 99_999))),
    ),
]

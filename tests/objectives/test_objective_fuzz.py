"""Random objective strings: an objective that its own string gives again, or one line of error.

The same holds for strings with ranges, which describe many objectives.

Nothing in the strings ever runs: while a string is parsed, any call that could run code fails the
test.
"""

from __future__ import annotations

import builtins
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from unittest.mock import patch

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from objective_strategies import OBJECTIVES

from geffect_fast.errors import InputError
from geffect_fast.objectives import GA, available, parse, parse_list
from geffect_fast.objectives.parse import MAX_CHARACTERS
from geffect_fast.objectives.ranges import MAX_OBJECTIVES, expand_list

RUNNERS = (
    (builtins, "eval"),
    (builtins, "exec"),
    (builtins, "compile"),
    (builtins, "open"),
    (os, "system"),
    (os, "execv"),
    (os, "posix_spawn"),
    (subprocess, "Popen"),
)

LONGEST_LINE = 400

CODE = (
    "__import__('os').system('touch made')",
    "open('made', 'w')",
    "exec('import os')",
    'eval("1")',
    "().__class__.__bases__[0].__subclasses__()",
    "lambda: 0",
    "[x for x in (1,)]",
    "{0.__class__}",
    "$(touch made)",
    "`touch made`",
    "; import os",
    "%s%n",
    "\\x28",
    "!!python/object/apply:os.system",
)


@contextmanager
def nothing_runs():
    """Fail where code is compiled, run or imported, a file opened or a process started."""

    def fail(*_args, **_kwargs):
        pytest.fail("the parser ran something")

    load = builtins.__import__

    def imported(name, *args, **kwargs):
        # an import statement inside of a function comes here too
        if name.partition(".")[0] not in ("lark", "geffect_fast") or name not in sys.modules:
            fail()
        return load(name, *args, **kwargs)

    patches = [patch.object(module, name, fail) for module, name in RUNNERS]
    patches.append(patch.object(builtins, "__import__", imported))
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in reversed(patches):
            each.stop()


parse_list("ga")  # builds the parser, which compiles its grammar


def read_calmly(text):
    """Read `text` in every way: it gives objectives that its own string gives again, or a line."""
    for read in (lambda t: [parse(t)], parse_list, members):
        try:
            with nothing_runs():
                found = read(text)
        except InputError as error:
            message = str(error)
            assert message.splitlines() == [message]
            assert message.isprintable() and len(message) < LONGEST_LINE
        else:
            assert len(found) <= MAX_OBJECTIVES
            for objective in found[:20]:
                again = parse(str(objective))
                assert again == objective and str(again) == str(objective)


def members(text):
    """The objectives of all sweeps in a text; each sweep's own text gives the sweep again."""
    sweeps = expand_list(text)
    for sweep in sweeps:
        assert expand_list(sweep.text) == [sweep]
    return [objective for sweep in sweeps for _, objective in sweep.members]


WORDS = ["beta", "alpha", "layer", "true", "log", "1", "0.1", "1e-3", "2", "1:2:3", "0.1:2:4,log"]
pieces = st.sampled_from([*available(), *"()+-*=,.: ", *WORDS, *CODE])


@st.composite
def with_ranges(draw):
    """An objective's string, and perhaps a range in place of some of its numbers."""
    text = str(draw(OBJECTIVES))
    numbers = list(re.finditer(r"(?<![\w.])\d[\d.e+-]*", text))
    for number in reversed(draw(st.lists(st.sampled_from(numbers)) if numbers else st.just([]))):
        start, stop = draw(st.tuples(st.floats(0, 9), st.floats(0, 9)).map(sorted))
        swept = (
            f"{start:.3g}:{stop:.3g}:{draw(st.integers(1, 4))}{draw(st.sampled_from(['', ',log']))}"
        )
        text = text[: number.start()] + swept + text[number.end() :]
    return text


valid = st.one_of(OBJECTIVES.map(str), with_ranges())


@st.composite
def nearly_valid(draw):
    """A valid string with a few pieces or characters put in, left out or doubled."""
    text = draw(valid)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = min(start + draw(st.integers(0, 4)), len(text))
        middle = draw(st.one_of(pieces, st.text(max_size=2), st.just(2 * text[start:end])))
        text = text[:start] + middle + text[end:]
    return text


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=80), st.binary(max_size=40).map(lambda b: b.decode("latin-1"))))
def test_any_text(text):
    read_calmly(text)


@settings(max_examples=300, deadline=None)
@given(st.lists(pieces, max_size=20).map("".join))
def test_pieces_of_objectives_and_of_code(text):
    read_calmly(text)


@settings(max_examples=300, deadline=None)
@given(nearly_valid())
@example("wga(alpha=0:0:1000000000000002e+248)")
def test_strings_that_are_nearly_valid(text):
    read_calmly(text)


@settings(max_examples=150, deadline=None)
@given(valid, st.sampled_from(CODE), st.data())
def test_code_inside_of_a_valid_string(text, code, data):
    at = data.draw(st.integers(0, len(text)))
    read_calmly(text[:at] + code + text[at:])
    for whole in (code, f"ga({code})", f"npo(beta={code})", f"{code}*ga", f"ga + {code}"):
        with pytest.raises(InputError):
            parse(whole)


@settings(max_examples=50, deadline=None)
@given(st.text(min_size=1, max_size=6), st.integers(1, 4))
def test_long_strings_are_refused_by_their_length(text, times):
    text *= times * MAX_CHARACTERS // len(text) + 1
    if text.strip():
        with pytest.raises(InputError, match="characters, at most") as caught, nothing_runs():
            parse(text)
        assert len(str(caught.value)) < LONGEST_LINE
    else:
        read_calmly(text)


@pytest.mark.parametrize(
    "run",
    [
        lambda: builtins.eval("1"),
        lambda: builtins.compile("1", "objective", "eval"),
        lambda: builtins.__import__("json"),
        lambda: builtins.open("made"),  # noqa: PTH123, SIM115
        lambda: os.system("true"),
        lambda: subprocess.Popen(["true"]),
    ],
)
def test_the_guard_notices_what_runs(run):
    with pytest.raises(pytest.fail.Exception), nothing_runs():
        run()
    assert parse("ga") == GA()

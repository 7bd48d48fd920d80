"""Errors: a remedy that is given apart, which a caller may replace, and the step of a training."""

from __future__ import annotations

import pickle

import pytest

from geffect_fast.errors import GEffectError, InputError, NonFiniteError, UnfinishedError


@pytest.mark.parametrize("kind", [InputError, NonFiniteError, UnfinishedError])
def test_a_remedy_is_apart_from_the_problem(kind):
    error = kind("'a; b.json' is torn\n", remedy="repeat the run")
    assert str(error) == r"'a; b.json' is torn\n; repeat the run"
    assert error.problem == r"'a; b.json' is torn\n"
    assert kind("it is torn; repeat the run").problem == "it is torn; repeat the run"


def test_a_step_begins_the_message_and_not_the_problem():
    error = NonFiniteError("the loss is nan", remedy="use fp32", step=3)
    assert (str(error), error.problem) == ("step 3: the loss is nan; use fp32", "the loss is nan")
    assert error.step == 3 and NonFiniteError("the loss is nan").step is None


def test_an_error_is_the_same_in_another_process():
    error = NonFiniteError("the loss is nan", remedy="use fp32", step=3)
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, GEffectError) and str(copy) == str(error)
    assert (copy.problem, copy.step) == (error.problem, 3)

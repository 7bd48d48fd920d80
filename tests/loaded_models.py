"""A watch over the models that a command loads: each is freed before the next one is loaded."""

from __future__ import annotations

import gc
import sys
import weakref

import pytest
from torch import nn

from geffect_fast.measure import by_config
from geffect_fast.measure.evaluator import Evaluator


def watch_models(monkeypatch: pytest.MonkeyPatch, kept: int = 0) -> list[weakref.ref[nn.Module]]:
    """Fail where a model is loaded while an earlier one is in memory.

    During each measurement the variables of all frames are read, as `torch.jit.script` reads them:
    until Python 3.12 a frame then keeps what they hold, whatever is deleted, until it ends.

    Args:
        kept: how many of the first models stay.

    Returns:
        The models that were loaded, filled as they are.
    """
    models: list[weakref.ref[nn.Module]] = []
    load, measure = by_config.load_model, Evaluator.measure

    def loaded(*args, **kwargs):
        gc.collect()
        assert all(each() is None for each in models[kept:])
        found = load(*args, **kwargs)
        models.append(weakref.ref(found))
        return found

    def measured(*args, **kwargs):
        frame = sys._getframe()
        while frame is not None:
            assert frame.f_locals is not None
            frame = frame.f_back
        return measure(*args, **kwargs)

    monkeypatch.setattr(by_config, "load_model", loaded)
    monkeypatch.setattr(Evaluator, "measure", measured)
    return models

"""Sweeps without a model, and a browser, for tests of several reports."""

from __future__ import annotations

import pytest
from chromium import Browser
from synthetic import make_dataset

from geffect_fast.measure import sweep as sweep_module

TEXTS = ["wga(alpha=1:4:4)", "npo(beta=0.1:10:3,log)", "wtnpo(1:2:2, alpha=3:5:3)", "ga"]


@pytest.fixture
def swept(monkeypatch):
    """A function that makes the result of a sweep with given totals, or with made-up ones."""

    def make(texts=TEXTS, e_u=None, e_r=None, **kwargs):
        def made_up(_model, _tokenizer, objectives, **_arguments):
            names = [str(objective) for objective in objectives]
            dataset = make_dataset(names, **{"resolve": (), "n_blocks": 1} | kwargs)
            effect = dataset["g_effect"]
            for risk, totals in ((0, e_u), (1, e_r)):
                if totals is not None:
                    effect[:, risk] = totals
            return dataset

        monkeypatch.setattr(sweep_module, "profile", made_up)
        return sweep_module.sweep(None, None, forget=[], retain=[], objectives=texts)

    return make


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser

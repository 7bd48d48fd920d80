"""The frontier's picture: its points, its curve and its texts."""

from __future__ import annotations

import numpy as np
from token_results import drawn_shares, token_result

import geffect_fast as gf
from geffect_fast.report.figures.frontier import frontier_figure


def drawn(result, **asked):
    """The best weights, and the panel that a frontier is drawn on."""
    best = gf.optimal_weights(result, **asked)
    (panel,) = frontier_figure(result, best).axes
    return best, panel


def lines(panel):
    return {line.get_label(): np.array(line.get_data()) for line in panel.lines}


def words(panel):
    return [text.get_text() for text in panel.texts]


OTHERS = {"wga(alpha=1)": 0.4, "npo(beta=0.1)": 40.0, "gd": 1.2}


def test_the_curve_the_choice_and_every_objective_are_there():
    result = token_result(drawn_shares([9, 14, 6]), OTHERS)
    best, panel = drawn(result, retain_budget=0.002)
    found = lines(panel)
    curve = found["the best that token weights from 0 to 1 do"]
    assert np.array_equal(curve, [best.frontier_e_u, best.frontier_e_r])
    chosen = found["chosen: most removal for e_r ≥ -0.002"]
    assert chosen.ravel().tolist() == [best.e_u, best.e_r]
    ga = result.g_effect.sel(objective="ga").sum(["sample", "token"]).values
    # npo is 40 times as large as ga, which lies within 1.3 of the curve at its place
    expected = np.outer([1, 0.4, 40 / 50, 1.2], ga)
    np.testing.assert_allclose(found["objectives"].T, expected, rtol=1e-12)
    assert {"ga", "wga(alpha=1)", "npo(beta=0.1) ÷ 50", "gd"} <= set(words(panel))
    assert any("wanted" in text for text in words(panel))
    title = panel.get_title(loc="left")
    assert "weights above 1" in title and "÷ k" in title


def test_labels_are_not_written_over_each_other():
    close = {f"wga(alpha={i})": 1 - 0.003 * i for i in range(12)}
    _, panel = drawn(token_result(drawn_shares([9, 14]), close), removal=-0.01)
    panel.figure.canvas.draw()  # saved figures have sizes of another resolution
    boxes = [text.get_window_extent() for text in panel.texts if text.get_text()[:3] == "wga"]
    assert len(boxes) == 12
    for i, box in enumerate(boxes):
        assert not any(box.shrunk(1, 0.95).overlaps(other.shrunk(1, 0.95)) for other in boxes[:i])


def test_many_objectives_are_told_apart_by_family():
    many = {f"wga(alpha={i})": 0.9**i for i in range(2, 14)} | {
        f"npo(beta={i})": 9.0 for i in (1, 2)
    }
    _, panel = drawn(token_result(drawn_shares([9, 14]), many | OTHERS), retain_budget=np.inf)
    assert {"ga", "wga", "npo ÷ 10", "npo ÷ 50"} <= set(lines(panel))
    assert lines(panel)["wga"].shape == (2, 13)
    assert "chosen: most removal, at any harm" in lines(panel) and "wga(alpha=1)" not in words(
        panel
    )


def test_objectives_that_are_not_finite_are_named():
    result = token_result(drawn_shares([9, 14]), OTHERS)
    result.g_effect[1, 0, 0, 0] = np.nan
    _, panel = drawn(result, removal=-0.01)
    assert "NaN or infinite: wga(alpha=1)" in words(panel)
    assert lines(panel)["objectives"].shape == (2, 3)


def test_a_curve_without_any_trade_is_a_point():
    best, panel = drawn(token_result([np.array([[-1.0, -2.0], [0.1, 0.2]])]), retain_budget=0)
    assert lines(panel)["the best that token weights from 0 to 1 do"].shape == (2, 1)
    assert float(best.shadow_price) == 0
    assert not any("÷" in text for text in words(panel))
    drawn(token_result([np.zeros((2, 3))]), retain_budget=0)

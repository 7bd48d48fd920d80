"""Runs side by side: shared steps and risks, names, and numbers that stay with their run."""

from __future__ import annotations

import numpy as np
import pytest
from models import build, samples
from step_results import step_dataset

import geffect_fast as gf
from geffect_fast.errors import InputError
from geffect_fast.report.summary.effects import by_place, total

NPO, GA = "npo(beta=0.1)", "ga"
KNOWN = {
    "probe_rows": '{"retain": [0, 2], "general": [1]}',
    "digests": '{"retain": "a", "general": "a"}',
}


def runs(**kwargs):
    """Two runs; the second was probed at every third step only, and on a further set."""
    probed = ("unlearn", "general", "retain")
    return {
        "a": step_dataset((GA, NPO), n_steps=13, **kwargs),
        "b": step_dataset((NPO,), n_steps=6, every=3, seed=1, risks=probed, **kwargs),
    }


def test_runs_meet_at_the_steps_and_risks_they_share():
    given = runs()
    both = gf.compare(list(given.values()))
    assert list(both["run"].values) == [GA, NPO] == list(both["objective"].values)
    assert both["step"].values.tolist() == [0, 3, 6, 9, 12]
    assert both["risk"].values.tolist() == ["unlearn", "retain"]
    a, b = given.values()
    np.testing.assert_allclose(both.g_effect[0], total(a)[::3, 0])
    np.testing.assert_allclose(both.g_effect[1], total(b)[:5, 0][:, [0, 2]])
    np.testing.assert_array_equal(both.risk_value[0], a.risk_value[::3])
    np.testing.assert_array_equal(both.risk_value[1], b.risk_value[:5, [0, 2]])
    np.testing.assert_array_equal(both.cosine[1], b.cosine[:5, 0, [0, 2]])
    np.testing.assert_array_equal(both.loss[0], a.loss[::3, 0])
    np.testing.assert_array_equal(both.predicted_sgd[0], a.predicted_sgd[::3])
    assert both.left_out == [
        "result 1: 8 steps from 1 to 11",
        "result 2: step 15",
        "result 2: the risk on general",
    ]
    for result, before in zip(given.values(), runs().values(), strict=True):
        assert result.identical(before)


def test_parts_of_the_model_stand_front_to_back_and_add_up():
    given = runs()
    both = gf.compare(given)
    labels, parts = by_place(given["a"], blocks=False)
    assert both["group"].values.tolist() == labels
    np.testing.assert_allclose(both.group_effect[0], parts[::3, 0])
    np.testing.assert_allclose(both.group_effect.sum("group"), both.g_effect)
    by_group = runs(resolve=("group", "sample"))
    parts = by_place(by_group["b"], blocks=False)[1]
    np.testing.assert_allclose(gf.compare(by_group).group_effect[1], parts[:5, 0][:, [0, 2]])
    assert "group_effect" not in gf.compare({**given, "b": runs(resolve=("sample",))["b"]})


def test_curves_are_named_by_what_tells_them_apart(tmp_path):
    a, b = runs().values()
    again = a.assign(loss=a["loss"] + 1)
    assert gf.compare({"first": a, "second": b})["run"].values.tolist() == ["first", "second"]
    names = gf.compare([a, again, b])["run"].values.tolist()
    assert names == [f"result 1: {GA}", f"result 2: {GA}", NPO]
    files = []
    for place, result in (("x/run", a), ("y/run", again), ("z", b)):
        (tmp_path / place).mkdir(parents=True)
        files.append(tmp_path / place / "results.nc")
        result.drop_vars("token_weight").to_netcdf(files[-1], engine="h5netcdf")
    names = gf.compare([files[0].parent, files[2], files[1].parent])["run"].values.tolist()
    assert names == [f"{files[0].parent}: {GA}", NPO, f"{files[1].parent}: {GA}"]
    named = gf.compare([files[0].parent, files[2].parent, again])["run"].values.tolist()
    assert named == [f"run: {GA}", NPO, f"result 3: {GA}"]


def test_a_run_of_checkpoints_is_a_curve_of_each_of_its_objectives():
    a, b = runs().values()
    checkpoints = step_dataset(("wga(alpha=1)", "gd"), trained=False, n_steps=4, every=3)
    found = gf.compare([a, checkpoints])
    assert found["run"].values.tolist() == [GA, "wga(alpha=1)", "gd"]
    assert found["trained"].values.tolist() == [True, False, False]
    np.testing.assert_allclose(found.g_effect[2], total(checkpoints)[:, 1])
    named = gf.compare({"x": checkpoints, "y": b})["run"].values.tolist()
    assert named == ["x: wga(alpha=1)", "x: gd", "y"]


def test_norms_are_left_out_where_a_run_has_none():
    a, b = runs().values()
    both = gf.compare([a, b.drop_vars(["cosine", "grad_norm"])])
    assert not {"cosine", "grad_norm"} & set(both) and "loss" in both


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda d: d.assign_attrs(reduction="sum"), "has reduction 'token', result 2 'sum'"),
        (lambda d: d.assign_attrs(n_forget=7), "on 12 forget and 3 retain rows, result 2 on 7 f"),
        (lambda d: d.assign_attrs(probe_rows='{"retain": [1]}'), "retain rows of .*--probe-rows"),
        (lambda d: d.assign_attrs(digests='{"retain": "b"}'), "retain rows of .*on the same data"),
        (lambda d: d.assign_attrs(digests='{"general": "b"}'), "the general rows of result 1 are"),
        (lambda d: d.isel(step=[0]), "share 1 steps .result 1 0 to 12, result 2 0 alone."),
        (lambda d: d.assign_coords(step=d["step"] + 100), "probe them at the same steps"),
        (
            lambda d: d.assign_coords(question=("sample", [f"{i}?" for i in range(15)])),
            "forget row 0 of result 1 is not that of result 2",
        ),
    ],
)
def test_runs_that_measure_other_things_are_refused(change, line):
    a, b = (run.assign_attrs(KNOWN) for run in runs().values())
    assert gf.compare([a, b]).sizes["run"] == 2
    with pytest.raises(InputError, match=line):
        gf.compare([a, change(b)])


def test_only_sets_that_two_runs_share_must_be_the_same():
    a, b = (run.assign_attrs(KNOWN) for run in runs().values())
    fewer = b.assign_attrs(probe_rows='{"retain": [0, 2]}', digests='{"retain": "a"}')
    assert gf.compare([a, fewer]).sizes["run"] == 2
    old = a.drop_attrs().assign_attrs(
        {name: a.attrs[name] for name in a.attrs if name not in KNOWN}
    )
    assert gf.compare([old, b]).sizes["run"] == 2
    other = step_dataset(("gd",), seed=2).assign_attrs(KNOWN | {"digests": '{"retain": "b"}'})
    with pytest.raises(InputError, match="the retain rows of result 2 are not those of result 3"):
        gf.compare([old, b, other])


def test_a_result_tells_its_rows_from_others_of_the_same_number():
    def run(objective, general, refused=None, **more):
        data = {"forget": samples([5, 7], 1), "retain": samples([6, 3], 2)}
        for row in data["forget"] if refused else ():
            row["alternative"] = samples([4], refused)
        return gf.unlearn(
            build("llama"), None, **data, probes={"general": samples([4, 4], general)},
            objective=objective, steps=1, probe_rows="all", resolve=(), **more,
        )  # fmt: skip

    a, same = run("ga", general=3), run("po", general=3, refused=4, learning_rate=1e-3)
    assert gf.compare([a, same]).sizes["run"] == 2
    with pytest.raises(InputError, match="the general rows of result 1 are not those of result 2"):
        gf.compare([a, run("gd", general=5)])


def test_questions_of_retain_rows_may_differ():
    """Only a run with a part on retain rows has retain rows on its sample axis."""
    a, b = runs().values()
    found = gf.compare([a, b.isel(sample=(b["set"] == "forget").values)])
    assert found.sizes["run"] == 2

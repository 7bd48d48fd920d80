"""Results that another program made or changed, or that claim what they cannot hold."""

from __future__ import annotations

import h5py
import numpy as np
from bad_input.case import Case, both, gone
from bad_input.folders import a_run, changed
from step_results import step_dataset

from geffect_fast.storage.results_file import save_result
from geffect_fast.storage.run_folder import open_run


def without(attribute):
    """The change of a result that takes an attribute away."""

    def change(dataset):
        del dataset.attrs[attribute]
        return dataset

    return change


def claims_much(here, _patch):
    """Write a few KB that HDF5 reads as 8 GiB of numbers, none of which was written."""
    with h5py.File(here / "run/results.nc", "a") as file:
        scales = [ref[0] for ref in file["g_effect"].attrs["DIMENSION_LIST"]]
        names = [file[ref].name for ref in scales]
        del file["g_effect"]
        shape = [file[name].shape[0] for name in names]
        del file[names[-1]]
        shape[-1] = 2**30 // int(np.prod(shape[:-1]))
        file.create_dataset(names[-1], (shape[-1],), "i8", chunks=(1024,)).make_scale("sample")
        made = file.create_dataset("g_effect", shape, "f8", chunks=(1, 1, 1, 1024))
        for axis, name in enumerate(names):
            made.dims[axis].attach_scale(file[name])


def steps(change):
    """A changed step result in the folder `run`, and another step result beside it."""

    def apply(here, _patch):
        for name, made in (("run", change(step_dataset(n_steps=3))), ("one", step_dataset(seed=1))):
            (here / name).mkdir()
            save_result(made, here / name / "results.nc")

    return apply


ODD = {
    "no retain risk": (lambda d: d.sel(risk=["unlearn"]), "no risk 'retain'"),
    "no unlearn risk": (lambda d: d.sel(risk=["retain"]), "no risk 'unlearn'"),
    "no risks": (lambda d: d.isel(risk=[]), "axis 'risk' is empty"),
    "no objectives": (lambda d: d.isel(objective=[]), "axis 'objective' is empty"),
    "no samples": (lambda d: d.isel(sample=[]), "axis 'sample' is empty"),
    "an objective twice": (lambda d: d.isel(objective=[0, 0]), "'objective' has a value twice"),
    "a risk twice": (lambda d: d.isel(risk=[0, 1, 1]), "'risk' has a value twice"),
    "risks by number": (lambda d: d.assign_coords(risk=[1, 2]), "'risk' holds no names"),
    "whole numbers": (lambda d: d.assign(g_effect=d.g_effect.astype(int)), "g_effect holds int"),
    "words": (lambda d: d.assign(g_effect=d.g_effect.astype(str)), "g_effect holds"),
    "an axis more": (lambda d: d.expand_dims(seed=2).transpose(..., "seed"), "an axis 'seed'"),
    "no names of parameters": (lambda d: d.drop_vars("parameter"), "no coordinate 'parameter'"),
    "no blocks": (lambda d: d.drop_vars("block"), "no coordinate 'block'"),
    "no sets": (lambda d: d.drop_vars("set"), "no coordinate 'set'"),
    "rows that nobody counted": (without("n_forget"), "no attribute 'n_forget'"),
    "an unknown engine": (without("engine"), "no attribute 'engine'"),
    "coverage in words": (lambda d: d.assign_attrs(covered_elements="all"), "an odd attribute"),
    "versions in words": (lambda d: d.assign_attrs(versions="new"), "an odd attribute 'versions'"),
}

CASES = [
    *(
        Case(f"a result with {name}", ["show", "run"], says, "repeat the run", changed(by))
        for name, (by, says) in ODD.items()
    ),
    Case(
        "a report of a result without a risk",
        ["report", "run"],
        "no risk 'retain'",
        "repeat the run",
        changed(ODD["no retain risk"][0]),
    ),
    Case(
        "an export of a result without samples",
        ["export", "run", "--to", "t.csv"],
        "axis 'sample' is empty",
        "repeat the run",
        changed(ODD["no samples"][0]),
    ),
    Case(
        "a changed result from Python",
        lambda here: open_run(here / "run"),
        "no coordinate 'block'",
        "repeat the run",
        changed(ODD["no blocks"][0]),
    ),
    *(
        Case(
            f"{words[0]} of steps that nothing was measured between",
            words,
            "no variable 'measured_change'",
            "repeat the run",
            steps(lambda d: d.drop_vars("measured_change")),
        )
        for words in (["show", "run"], ["compare", "run", "one"], ["report", "run"])
    ),
    *(
        Case(
            f"{name} of a few KB that claim 8 GiB",
            run,
            "it claims to hold 8.1 GiB, in a file of",
            "repeat the run",
            both(a_run, gone("run/manifest.json"), claims_much),
        )
        for name, run in (
            ("show", ["show", "run"]),
            ("export", ["export", "run", "--to", "t.csv"]),
            ("open_run", lambda here: open_run(here / "run")),
        )
    ),
]

"""The check that the step results of two runs measure the same risks on the same rows."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from geffect_fast.errors import InputError

if TYPE_CHECKING:
    import xarray as xr

SETTINGS = ("risk", "reduction")
"""Attributes with settings that runs must share for their numbers to be comparable."""
COUNTS = ("n_forget", "n_retain")
"""Attributes with numbers of rows that runs must share."""
BY_SET = ("probe_rows", "digests")
"""Attributes, JSON by data set, that runs must share for every data set that both have."""


def check_same_data(
    first: str, one: xr.Dataset, second: str, two: xr.Dataset, what: str = "compare"
) -> None:
    """Raise `InputError` where two runs differ in risk, reduction or rows.

    Args:
        first, second: names of the runs in messages.
        one, two: their results.
        what: the beginning of messages.
    """
    for setting in SETTINGS:
        if one.attrs.get(setting) != two.attrs.get(setting):
            raise InputError(
                f"{what}: {first} has {setting} {one.attrs.get(setting)!r}, {second} "
                f"{two.attrs.get(setting)!r}; compare runs of the same risk and reduction"
            )
    counts = [
        "{} forget and {} retain rows".format(*map(each.attrs.get, COUNTS)) for each in (one, two)
    ]
    if counts[0] != counts[1]:
        raise InputError(
            f"{what}: {first} was measured on {counts[0]}, {second} on {counts[1]}; "
            "compare runs on the same data, with the same --probe-rows"
        )
    for attribute in BY_SET:  # results of earlier versions may lack them
        here, there = (json.loads(each.attrs.get(attribute, "{}")) for each in (one, two))
        for name in here:
            if name in there and here[name] != there[name]:
                raise InputError(
                    f"{what}: the {name} rows of {first} are not those of {second}; compare "
                    "runs on the same data, with the same tokenizer, template and --probe-rows"
                )
    asked, too = (_questions(each) for each in (one, two))
    if asked is not None and too is not None:
        different = next(
            (i for i, (a, b) in enumerate(zip(asked, too, strict=True)) if a != b), None
        )
        if different is not None:
            raise InputError(
                f"{what}: forget row {different} of {first} is not that of {second}; "
                "compare runs on the same data"
            )


def _questions(dataset: xr.Dataset) -> list[str] | None:
    """The forget rows' questions; None where samples are summed."""
    if "question" not in dataset.coords:
        return None
    return [str(q) for q in dataset["question"].values[dataset["set"].values == "forget"]]

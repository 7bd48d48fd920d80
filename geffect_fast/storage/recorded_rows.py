"""The check that the rows of a replay or resumed run equal the recorded ones, token for token."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

from geffect_fast.errors import GEffectWarning, InputError


def check_recorded(
    recorded: Mapping[str, str], found: Mapping[str, str], resumed: Path | None = None
) -> None:
    """Warn of a replay, and refuse to resume a run, whose rows differ from those recorded.

    Args:
        recorded: digests by data set; empty where nothing was recorded.
        found: digests of the rows that are read now, by data set.
        resumed: folder of the run to resume; None for a replay, which gets a warning.

    Raises:
        InputError: rows differ and `resumed` is given. The message names the data set and all
            possible reasons.
    """
    name = next((n for n, digest in recorded.items() if found.get(n, digest) != digest), None)
    if name is None:
        return
    reasons = (
        "its data, the tokenizer or its chat template has changed, or transformers reads them in "
        "another way"
    )
    if resumed is not None:
        raise InputError(
            f"resume: the rows of {name} are other tokens than when the run in {resumed} was "
            f"begun: {reasons}; bring back what it was, or begin another run in another --out"
        )
    warnings.warn(
        f"the rows of {name} are other tokens than the config recorded, so this is no replay: "
        f"{reasons}",
        GEffectWarning,
        stacklevel=2,
    )

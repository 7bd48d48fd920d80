"""Whether the rows of a replay are, token for token, those that a run folder speaks of."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

from geffect_fast.errors import GEffectWarning, InputError


def check_recorded(
    recorded: Mapping[str, str], found: Mapping[str, str], resumed: Path | None = None
) -> None:
    """Tell of rows that are others than a config recorded; a run that is gone on with is refused.

    Args:
        recorded: digests by data set; empty where nothing was recorded.
        found: the same now.
        resumed: folder of the run that is gone on with; None: a replay, which is warned of.

    Raises:
        InputError: with `resumed`; the data set is named, with all that can be the reason.
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

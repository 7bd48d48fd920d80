"""matplotlib, whatever MPLBACKEND says: the backend of windows, of which none opens here."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

if "matplotlib" not in sys.modules:
    named = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if named is not None:
            os.environ["MPLBACKEND"] = named
    if named:
        # as matplotlib does it, which then fails where it knows none of that name
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = named

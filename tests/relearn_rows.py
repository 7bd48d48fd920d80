"""Rows, and a relearning of them, that tests of `relearn` share."""

from __future__ import annotations

from geffect_fast.demo.authors import make_fictitious_authors

ROWS = make_fictitious_authors(2, seed=3)
FORGET, OTHERS = ROWS[:5], ROWS[5:9]
ASKED = {"forget": FORGET, "n_rows": 2, "steps": 5, "measure_every": 2, "learning_rate": 3e-3}

PUBLISHED = {  # OPTML-Group/Unlearn-Smooth at fc655ba
    "sam-wmdp": {"n_rows": 20, "steps": 15, "lr_schedule": "linear", "warmup_steps": 1, "seed": 1}
    | {"max_length": 512},
    "sam-muse-books": {"n_rows": "all", "steps": 100, "lr_schedule": "cosine", "warmup_steps": 0}
    | {"max_length": 2048},
    "sam-muse-news": {"n_rows": "all", "steps": 150, "lr_schedule": "cosine", "warmup_steps": 0}
    | {"max_length": 2048},
}

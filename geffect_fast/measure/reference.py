"""Where the reference, which NPO-like objectives compare with, computes what the model does."""

from __future__ import annotations

REFERENCE_IS_MODEL = (
    "the model itself, with which every log-ratio is 0: npo, dpo, tnpo, wtnpo are the same at any "
    "beta but for their scale, and the gradient of kl is 0; give the model as it was before "
    "unlearning (--reference) where that is another"
)
"""What it means, for people."""

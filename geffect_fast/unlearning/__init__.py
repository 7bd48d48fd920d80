"""Unlearning runs: a model is trained on an objective, and probed on the way."""

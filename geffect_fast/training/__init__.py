"""Unlearning and relearning by transformers' Trainer, and how a run is gone on with."""

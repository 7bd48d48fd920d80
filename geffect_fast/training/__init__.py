"""Unlearning and relearning by transformers' Trainer, and checkpoints to resume a run from."""

"""Effects over the steps of a training: probes, checkpoints, comparisons of runs."""

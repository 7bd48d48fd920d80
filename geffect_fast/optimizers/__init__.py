"""What optimizers make of a gradient, and their state by the names of a model's parameters."""

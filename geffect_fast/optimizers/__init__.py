"""The step that an optimizer makes of a gradient, and its state by the model's parameter names."""

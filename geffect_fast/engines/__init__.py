"""Risk gradients, and the reverse and the forward engine that measure along them."""

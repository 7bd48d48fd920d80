"""Models loaded, data prepared, and what is measured of them."""

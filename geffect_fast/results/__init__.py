"""Results: their axes and coordinates, their intervals, the Dataset."""

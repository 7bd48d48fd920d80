"""Axes of results and what lies along them, intervals, the Dataset."""

"""Plots of results, in one style."""

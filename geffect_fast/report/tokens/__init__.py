"""The token view: which tokens an objective attacks, in a terminal and as a page."""

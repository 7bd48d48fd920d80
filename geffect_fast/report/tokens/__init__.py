"""The token view: the tokens that an objective attacks, in a terminal and as a page."""

"""HTML pages of runs, which need no network, and the templates of all HTML."""

"""Pages that need no network: reports of runs, and the token view."""

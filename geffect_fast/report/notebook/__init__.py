"""Display of results by themselves, in a notebook and in a plain terminal."""

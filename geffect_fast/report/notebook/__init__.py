"""What results show of themselves, in a notebook and in a plain terminal."""

"""Linear attention and recurrences: layers whose state does not grow with the sequence."""

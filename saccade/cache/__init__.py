"""The key-value store: preallocated, grouped by policy, with the position of every slot."""

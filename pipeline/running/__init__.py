"""A run: what is left to do, by whom, and where."""

"""Benchmarks of the field, and the drawn world, as items."""

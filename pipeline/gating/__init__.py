"""Which results are kept: figures that gates judge, and what becomes of a result at each."""

"""`shardedit check-model`: whether a checkpoint can be used, before a million images are; one page, and JSON."""

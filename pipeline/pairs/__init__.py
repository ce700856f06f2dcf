"""Sets of edit pairs: what trainers read, checked and written."""

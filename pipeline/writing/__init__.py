"""Outcomes become rows, rows become files, and a manifest, written last, makes them count."""

"""Judges: what they are asked, how their answers are read, and how none is paid for twice."""

"""What one sees of a run before, while and after it is at work."""

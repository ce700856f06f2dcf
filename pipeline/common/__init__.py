"""What every floor stands on: what may be shown, how a run is stopped, words of numbers."""

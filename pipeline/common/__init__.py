"""What every layer uses: what may be shown, how a run is stopped, numbers in words."""

"""What an operator types, one file each: `python -m jobs.NAME`, here or under `ray job submit`."""

"""Compare the local latent bases of runs.  `python -m jobs.geometry CONFIG [key=value ...]`"""

from __future__ import annotations

import sys

from pipeline.entry import main

if __name__ == "__main__":
    main(["geometry", *sys.argv[1:]])

"""Sparse autoencoders of what a network's blocks write.  `python -m jobs.sae collect|train|score|label|layout CONFIG`

On a cluster: `ray job submit --working-dir . -- python -m jobs.sae collect CONFIG [section.key=value ...]`
"""

from __future__ import annotations

import sys

from pipeline.entry import main

if __name__ == "__main__":
    main(["sae", *sys.argv[1:]])

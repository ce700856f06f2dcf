"""Compare methods on a benchmark or a set of one's own.  `python -m jobs.evaluate CONFIG [section.key=value ...]`

On a cluster: `ray job submit --working-dir . -- python -m jobs.evaluate CONFIG [section.key=value ...]`
"""

from __future__ import annotations

import sys

from pipeline.entry import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])

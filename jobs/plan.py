"""What would a run take?  `python -m jobs.plan CONFIG [section.key=value ...]`"""

from __future__ import annotations

import sys

from pipeline.entry import main

if __name__ == "__main__":
    main(["plan", *sys.argv[1:]])

"""How far is a run?  `python -m jobs.status OUT_OR_CONFIG`"""

from __future__ import annotations

import sys

from pipeline.entry import main

if __name__ == "__main__":
    main(["status", *sys.argv[1:]])

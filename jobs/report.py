"""Write a run's report again.  `python -m jobs.report OUT_OR_CONFIG`"""

from __future__ import annotations

import sys

from pipeline.entry import main

if __name__ == "__main__":
    main(["report", *sys.argv[1:]])

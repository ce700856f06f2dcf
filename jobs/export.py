"""Write results of runs in the columns that a trainer reads.  `python -m jobs.export RUN ... --out FOLDER`"""

from __future__ import annotations

import sys

from pipeline.entry import main

if __name__ == "__main__":
    main(["export", *sys.argv[1:]])

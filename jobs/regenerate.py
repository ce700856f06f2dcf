"""Make one result again and compare.  `python -m jobs.regenerate OUT_OR_CONFIG KEY`"""

from __future__ import annotations

import sys

from pipeline.entry import main

if __name__ == "__main__":
    main(["regenerate", *sys.argv[1:]])

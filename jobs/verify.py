"""Is a run's output whole?  `python -m jobs.verify OUT_OR_CONFIG`"""

from __future__ import annotations

import sys

from pipeline.entry import main

if __name__ == "__main__":
    main(["verify", *sys.argv[1:]])

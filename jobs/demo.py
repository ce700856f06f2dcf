"""The demonstration, without a GPU or a download.  `python -m jobs.demo [--output FOLDER] [--images N]`"""

from __future__ import annotations

import sys

from pipeline.entry import main

if __name__ == "__main__":
    main(["demo", *sys.argv[1:]])

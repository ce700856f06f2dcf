"""Find what is wrong with a set of edit pairs.  `python -m jobs.audit FOLDER`

On a cluster: `ray job submit --working-dir . -- python -m jobs.audit FOLDER`
"""

from __future__ import annotations

import sys

from pipeline.entry import main

if __name__ == "__main__":
    main(["audit", *sys.argv[1:]])

"""Find the local latent basis of every image.  `python -m jobs.basis CONFIG [section.key=value ...]`

On a cluster: `ray job submit --working-dir . -- python -m jobs.basis CONFIG [section.key=value ...]`
"""

from __future__ import annotations

import sys

from pipeline.entry import main

if __name__ == "__main__":
    main(["basis", *sys.argv[1:]])

"""What `shardedit audit` prints."""

from __future__ import annotations

import sys
import time

from pipeline.common.showing import public_url
from pipeline.common.wording import count
from pipeline.pairs.audit import AuditConfig, audit


def show_audit(config: AuditConfig) -> int:
    """Look at a set and print what was found; the exit code."""
    began = time.perf_counter()
    found = audit(config, lambda text: print(text, file=sys.stderr, flush=True))
    seconds = time.perf_counter() - began
    for kind, counted in found.as_dict()["findings"].items():
        print(f"{counted['severity']:8} {kind:20} {counted['count']:>8,}  {100 * counted['share']:6.2f} %")
    print(f"{count(found.failed, 'row')} of {found.rows:,} with an error; {found.pictures / seconds:,.0f} images/s")
    print(f"{public_url(config.out)}/index.html has examples, rows-*.parquet a row per finding")
    return found.exit_code

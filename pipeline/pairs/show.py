"""What `shardedit audit` and `shardedit export` print."""

from __future__ import annotations

import sys
import time

from pipeline.common.showing import public_url
from pipeline.common.wording import count
from pipeline.pairs.audit import AuditConfig, audit
from pipeline.pairs.export import ExportConfig, export


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


def show_export(config: ExportConfig) -> None:
    """Write a set and print what is in it."""
    made = export(config, lambda text: print(text, file=sys.stderr, flush=True))
    print(", ".join(f"{split} {rows:,}" for split, rows in made.splits.items()))
    left_out = f"; {made.duplicates:,} duplicates left out" if made.duplicates else ""
    left_out += f"; {made.rejected:,} left out that gates rejected or nobody chose" if made.rejected else ""
    print(f"{count(len(made.files), 'file')}, {made.written} written now{left_out}: {public_url(config.out)}")
    for note in made.notes:
        print(f"note: {note}")
    if made.pushed is not None:
        print(f"pushed: {made.pushed}")

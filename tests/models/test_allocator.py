"""Freed memory stays with the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Four blocks of 16 MiB at once are more than glibc keeps of its own accord: 16,384 pages to fault in each time.
PROGRAM = """
import resource, sys
import torch
from pipeline.models.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
use = lambda: [torch.ones(4 << 20) for _ in range(4)]
for _ in range(10):
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    command = [sys.executable, "-c", PROGRAM, mode]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="speaks to glibc")
def test_a_freed_block_is_used_again_without_a_page_fault() -> None:
    assert 4 * faults("keep") < faults("leave")

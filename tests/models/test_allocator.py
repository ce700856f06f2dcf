"""Freed memory stays with the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Four blocks of 16 MiB at once are more than glibc keeps of its own accord, unless the heap happens to lie well:
# without the call, most runs of this program count 81,920 faults or more.
PROGRAM = """
import resource
import torch
from pipeline.models.allocator import keep_freed_memory
keep_freed_memory()
use = lambda: [torch.ones(4 << 20) for _ in range(4)]
for _ in range(10):
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="speaks to glibc")
def test_a_freed_block_is_used_again_without_a_page_fault() -> None:
    finished = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert int(finished.stdout) < 1_000

"""glibc's allocator, told to keep what a model frees.

A UNet on CPU allocates and frees the same tensors at every call. By default glibc gives large blocks back to the kernel
and takes them again, each page zeroed and faulted in anew: about a tenth of a small model's time.
"""

from __future__ import annotations

import ctypes
import sys

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # mallopt's names for them, malloc.h
LARGEST_BLOCK = 32 << 20  # bytes; glibc's own limit for what may come from the heap
MOST_KEPT = 256 << 20  # bytes that may lie unused at the heap's end


def keep_freed_memory() -> None:
    """Let this process keep up to 256 MiB of freed memory. Without glibc, nothing happens.

    It holds for the whole process: for the command line and workers of ours, never for somebody's notebook.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        mallopt(MMAP_THRESHOLD, LARGEST_BLOCK)
        mallopt(TRIM_THRESHOLD, MOST_KEPT)

"""glibc's allocator, told to keep what a model frees, and to give back what a large picture left.

A UNet on CPU allocates and frees the same tensors at every call. By default glibc gives large blocks back to the kernel
and takes them again, each page zeroed and faulted in anew: about a tenth of a small model's time.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # mallopt's names for them, malloc.h
LARGEST_BLOCK = 32 << 20  # bytes; glibc's own limit for what may come from the heap
MOST_KEPT = 256 << 20  # bytes that may lie unused at the heap's end


def keep_freed_memory() -> None:
    """Let this process keep up to 256 MiB of freed memory. Without glibc, nothing happens.

    It holds for the whole process: for the command line and workers of ours, never for somebody's notebook.
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, LARGEST_BLOCK)
        mallopt(TRIM_THRESHOLD, MOST_KEPT)


def give_freed_memory_back() -> None:
    """Return to the kernel what lies unused: of a picture of 64 megapixels Pillow leaves 244 MiB behind in every thread
    that had one, in blocks that are too small for glibc to return them by itself. Without glibc, nothing happens.
    """
    malloc_trim = _of_glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _of_glibc(name: str) -> Any:
    """A function of the C library; None where it has none of that name, as musl."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None

"""The C library's allocator, told whether results come fresh from the kernel or from its own free memory.

glibc moves its threshold while a program runs, so the same line gets fresh pages early in a program and warm ones
later, and pages that NumPy asked to be huge end up under torch's tensors. A benchmark has to say which it means. Where
the library is not glibc, "fresh" rests on results being kept alive alone.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MAPPED = 128 * 1024  # bytes: the threshold at the start of a program; larger blocks come from the kernel, and go back
LARGEST = 32 * 1024**2  # bytes: what the threshold grows to; blocks up to here are then reused


def _glibc() -> Any:
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None


_libc = _glibc()


def give_fresh() -> None:
    """From now on a block of `MAPPED` bytes or more is new from the kernel, as at the start of a program."""
    if _libc is not None:
        _libc.mallopt(M_MMAP_THRESHOLD, MAPPED)


def give_reused() -> None:
    """From now on a block up to `LARGEST` is taken from what was freed, as in a program that has run for a while."""
    if _libc is not None:
        _libc.mallopt(M_MMAP_THRESHOLD, LARGEST)
        _libc.mallopt(M_TRIM_THRESHOLD, 2 * LARGEST)


def release() -> None:
    """Give what was freed back to the kernel."""
    if _libc is not None:
        _libc.malloc_trim(0)

"""This process's memory: its peak from a moment of choice on, and what becomes of freed pieces."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from pathlib import Path

PROC = Path("/proc/self")

THRESHOLD_SWITCH = "MALLOC_MMAP_THRESHOLD_"
"""glibc's own variable for the same."""

_M_MMAP_THRESHOLD = -3  # its number in malloc.h


def reset_peak() -> None:
    """Count the peak from now on; where the system cannot (not Linux), it counts from the process's start."""
    try:
        (PROC / "clear_refs").write_text("5")
    except OSError:
        return


def give_back_large_pieces() -> None:
    """Have the C library return freed pieces of 2 MiB or more at once, for the rest of this process.

    glibc comes to keep those of up to 32 MiB, and gradients and optimizer states, which stay, lie between
    them: on 24 layers of LLaMA 30B's shape, 0.4 GB. Below 2 MiB, where speed begins to depend on it, users
    decide by MALLOC_MMAP_THRESHOLD_ (docs/guide/memory.md).
    """
    if sys.platform == "linux" and THRESHOLD_SWITCH not in os.environ:
        set_option = getattr(ctypes.CDLL(None), "mallopt", None)
        if set_option is not None:
            set_option(_M_MMAP_THRESHOLD, 2 << 20)


def peak_rss() -> int:
    """Return the most memory that was resident, in bytes; files that are mapped count while they are."""
    try:
        status = (PROC / "status").read_text()
    except OSError:
        import resource  # not on Windows, which has no /proc either

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return 1024 * int(found[1]) if found else 0

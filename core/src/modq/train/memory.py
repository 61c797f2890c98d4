"""The peak of this process's resident memory, from a moment of choice on."""

from __future__ import annotations

import re
import sys
from pathlib import Path

PROC = Path("/proc/self")


def reset_peak() -> None:
    """Count the peak from now on; where the system cannot (not Linux), it counts from the process's start."""
    try:
        (PROC / "clear_refs").write_text("5")
    except OSError:
        return


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

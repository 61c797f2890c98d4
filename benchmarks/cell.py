"""The process of one cell, seen from inside: settings come as JSON, figures go as one line of JSON."""

from __future__ import annotations

import json
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

MARK = "RESULT "
"""Starts the line that the runner reads; libraries print what they like around it."""

COMMON = ("torch", "transformers", "peft")


def run(measure: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Measure what the command line's JSON asks for, and print the figures for the runner."""
    warnings.simplefilter("ignore")  # theirs, about one another's old names
    figures = measure(json.loads(sys.argv[1]))
    print(f"\n{MARK}{json.dumps(figures)}", flush=True)


def versions(system: str) -> dict[str, str]:
    """Return the versions of the packages that took part in this process."""
    from benchmarks.quality_systems import find

    return versions_of(find(system).packages)


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of packages, and of what all have in common."""
    return {package: version(package) for package in (*COMMON, *packages)}


def write_once(folder: Path, write: Callable[[Path], None]) -> float | None:
    """Have a checkpoint written unless an earlier run left it, under another name until it is whole.

    Returns:
        The seconds that it took; None if it was there.
    """
    if folder.is_dir():
        return None
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    started = time.perf_counter()
    write(unfinished)
    seconds = time.perf_counter() - started
    unfinished.rename(folder)
    return seconds

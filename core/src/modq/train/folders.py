"""Writes result folders so that nothing half-written ever has the final name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from modq.errors import ModqError


class OutputError(ModqError):
    """A place where a result cannot be written."""


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yield a folder beside `final` to write into; rename it when all went well, remove it when not.

    Raises:
        OutputError: if `final` exists already, before or after the work.
    """
    require_free(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    unfinished = final.parent / f".{final.name}.{os.getpid()}.unfinished"
    unfinished.mkdir()
    try:
        yield unfinished
        _flush(unfinished)
        require_free(final)  # os.rename would replace an empty folder without a word
        unfinished.rename(final)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # gone already if it was renamed


def _flush(folder: Path) -> None:
    """Have every file on the disk before it gets the final name: a power cut must not empty it."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def require_free(final: Path) -> None:
    """Refuse a path that is taken: long work must not end in overwriting something."""
    if final.exists():
        raise OutputError(f"{str(final)!r} exists already; name a new folder or remove it")

"""Writes results so that nothing half-written ever has the final name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from modq.errors import ModqError


class OutputError(ModqError):
    """A place where a result cannot be written."""


class Interrupted(ModqError):  # noqa: N818  # nothing was wrong
    """The user stopped the work."""


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yield a folder beside `final` to write into; rename it when all went well, remove it when not.

    Raises:
        OutputError: if `final` exists already, before or after the work.
        Interrupted: in the place of a KeyboardInterrupt.
    """
    require_free(final)
    made = [parent for parent in final.parents if not parent.exists()]
    unfinished = final.parent / f".{final.name}.{os.getpid()}.unfinished"
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        finish_folder(unfinished, final)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {str(final)!r} was not written") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # gone already if it was renamed
        if not final.exists():
            with suppress(OSError):  # someone else has put something there
                for parent in made:
                    parent.rmdir()


def finish_folder(written: Path, final: Path) -> None:
    """Give a complete folder its name, having put it on the disk: a power cut must not empty it."""
    for path in written.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    require_free(final)  # os.rename would replace an empty folder without a word
    written.rename(final)


def require_free(final: Path) -> None:
    """Refuse a path that is taken: long work must not end in overwriting something."""
    if final.exists():
        raise OutputError(f"{str(final)!r} exists already; name a new folder or remove it")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)

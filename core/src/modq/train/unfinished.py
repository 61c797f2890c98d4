"""Keeps long work that is not complete, so that what was stopped or killed can go on.

`OUTPUT.unfinished/` holds run.json (what was asked for, and the sessions so far), result/, which becomes
OUTPUT once it is complete, and whatever else the work needs to go on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modq.folders import Interrupted, OutputError, finish_folder, require_free, write_json
from modq.train.processes import is_main, wait_for_all

SCHEMA = 1
"""The version of run.json."""


class Unfinished:
    """Work on its way to the folder `final`; only the main process of several writes.

    Args:
        final: the folder of the result.
        how_far: how much of the work is kept, in whatever it counts; 0 if nothing is.
    """

    def __init__(self, final: Path, how_far: Callable[[Unfinished], int]) -> None:
        self.final = final
        self.folder = final.with_name(f"{final.name}.unfinished")
        self.result = self.folder / "result"
        self.how_far = how_far
        self.sessions: list[dict[str, Any]] = []

    @contextmanager
    def writing(self, asked: Mapping[str, Any], *, resume: bool) -> Iterator[Path]:
        """Yield the folder of the result; give it its name when all went well.

        When not, what is worth it stays, to be resumed.

        Args:
            asked: what the work is of, as JSON; resumed work must be of the same.
            resume: whether to go on with work that was stopped.

        Raises:
            OutputError: if `final` exists, if there is stopped work and `resume` is false, if there is none
                and `resume` is true, or if it was of something else.
            Interrupted: in the place of a KeyboardInterrupt.
        """
        if not is_main():
            yield self.result
            wait_for_all()
            return
        require_free(self.final)
        before = self._find(asked) if resume else self._make()
        self.sessions = [*before, {"from": self.how_far(self)}]
        write_json(self.folder / "run.json", {"schema": SCHEMA, "asked": asked, "sessions": self.sessions})
        try:
            yield self.result
            wait_for_all()
            finish_folder(self.result, self.final)
            shutil.rmtree(self.folder)
        except KeyboardInterrupt:
            kept = "; add --resume to go on" if self.how_far(self) else ""
            raise Interrupted(f"interrupted; {str(self.final)!r} was not written{kept}") from None
        finally:
            if not self.how_far(self):
                shutil.rmtree(self.folder, ignore_errors=True)

    def _make(self) -> list[dict[str, Any]]:
        if self.folder.exists():
            raise OutputError(
                f"{str(self.folder)!r} holds work that was stopped; "
                "add --resume to go on with it, or remove the folder"
            )
        self.folder.mkdir(parents=True)
        return []

    def _find(self, asked: Mapping[str, Any]) -> list[dict[str, Any]]:
        path = self.folder / "run.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            before, sessions = dict(content["asked"]), list(content["sessions"])
        except FileNotFoundError:
            raise OutputError(f"nothing to resume: {str(path)!r} does not exist") from None
        except (KeyError, TypeError, ValueError):
            raise OutputError(f"{str(path)!r} is damaged; remove its folder and start anew") from None
        if differences := list(_differences(before, asked)):
            raise OutputError(f"the work in {str(self.folder)!r} began with {', '.join(differences)}")
        return sessions


def _differences(before: Mapping[str, Any], asked: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted({*before, *asked}):
        was, now = before.get(name), asked.get(name)
        if isinstance(was, dict) and isinstance(now, Mapping):
            yield from _differences(was, now)
        elif was != now:
            yield f"{name}={was!r}, not {now!r}"

"""Which of the checkpoints that transformers' Trainer wrote are whole."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path

from modq.train.processes import process_count


def last_whole(folder: Path) -> Path | None:
    """Return the last checkpoint in a folder that is whole."""
    return max(filter(is_whole, _all(folder)), key=step_of, default=None)


def last_step(folder: Path) -> int:
    """Return the step of the last whole checkpoint, 0 if there is none."""
    last = last_whole(folder)
    return step_of(last) if last else 0


def drop_damaged(folder: Path) -> None:
    """Remove the checkpoints that were being written when a process was killed."""
    for checkpoint in _all(folder):
        if not is_whole(checkpoint):
            shutil.rmtree(checkpoint)


def step_of(checkpoint: Path) -> int:
    """Return the step that a checkpoint was written at."""
    return int(checkpoint.name.rpartition("-")[2])


def is_whole(checkpoint: Path) -> bool:
    """Whether everything that resuming needs is there and complete.

    trainer_state.json is the main process's last file, but the others write their random states when they
    will. What torch.save writes is a zip file, whose directory comes last.
    """
    count = process_count()
    states = ["rng_state.pth"] if count == 1 else [f"rng_state_{rank}.pth" for rank in range(count)]
    with suppress(OSError, ValueError):
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        return all(zipfile.is_zipfile(checkpoint / name) for name in ("scheduler.pt", *states))
    return False


def _all(folder: Path) -> list[Path]:
    found = folder.glob("checkpoint-*") if folder.is_dir() else ()
    return [path for path in found if re.fullmatch(r"checkpoint-\d+", path.name)]

"""Runs cells, each in a process of its own and in its library's own environment, interleaved over rounds.

On a machine that others use too, a minute's figures are not the next minute's. So a round runs every cell
once, the rounds follow one another, and two cells are compared by the ratio of their figures within a
round: what is quoted is the median of these ratios, with the smallest and the largest.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cell import MARK
from benchmarks.peers import python_of

ROOT = Path(__file__).parents[1]

Figures = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Cell:
    """One thing to measure: a module that prints figures, what it is told, and who runs it.

    Attributes:
        name: what the results call it.
        module: is run as `python -m module SETTINGS`.
        settings: given to it as JSON.
        peer: the environment it runs in; None is the project's own.
        environment: variables that it gets on top of the runner's.
    """

    name: str
    module: str
    settings: Mapping[str, Any]
    peer: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Runs:
    """What one cell gave, a round an entry; None for a round in which it gave nothing."""

    cell: Cell
    rounds: list[Figures | None] = field(default_factory=list)
    not_run: str | None = None  # why, in a line

    def values(self, metric: str) -> list[float]:
        """Return the metric's figure of every round that has one; of a series, its median."""
        found = [figures[metric] for figures in self.rounds if figures and metric in figures]
        return [statistics.median(each) if isinstance(each, list) else each for each in found]


@dataclass(frozen=True, slots=True)
class Spread:
    """A median, and how far the rounds lie apart."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """Summarise the values; None if there are none."""
        return cls(statistics.median(values), min(values), max(values)) if values else None


def run_rounds(cells: Sequence[Cell], rounds: int, folder: Path, *, timeout: float, say: Say) -> list[Runs]:
    """Run every cell once a round.

    Args:
        cells: what to measure. A cell that cannot run is left out of later rounds, and says why.
        rounds: how often.
        folder: where the processes work, for some libraries write logs into the current folder. Every
            cell's figures are added to its `cells.jsonl` at once, so that a run which is stopped is not lost.
        timeout: the seconds that a cell may take.
        say: told what is going on.
    """
    runs = [Runs(cell) for cell in cells]
    for number in range(1, rounds + 1):
        for each in runs:
            if each.not_run is None:
                say(f"round {number}/{rounds}  {each.cell.name}")
                _run_once(each, folder, timeout, say)
    return runs


def _run_once(runs: Runs, folder: Path, timeout: float, say: Say) -> None:
    try:
        figures = run_cell(runs.cell, folder, timeout)
        runs.rounds.append(figures)
        _keep(folder / "cells.jsonl", {"name": runs.cell.name, **figures})
    except CellError as error:
        runs.rounds.append(None)
        runs.not_run = str(error)
        say(f"    not run: {error}")


def _keep(file: Path, figures: Figures) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as kept:
        kept.write(json.dumps(figures) + "\n")


class CellError(Exception):
    """A cell gave no figures; the message is the reason, in a line."""


def run_cell(cell: Cell, folder: Path, timeout: float) -> Figures:
    """Run one cell once and return its figures.

    Raises:
        CellError: if its environment is missing, or it failed, or took too long.
    """
    python = python_of(cell.peer)
    if not python.is_file():
        raise CellError(
            f"no environment for {cell.peer}: make it with python -m benchmarks.peers {cell.peer}"
        )
    command = [str(python), "-m", cell.module, json.dumps(dict(cell.settings))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **cell.environment}
    folder.mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        raise CellError(f"took more than {timeout:.0f} s") from None
    if done.returncode:
        raise CellError(f"exit code {done.returncode}: {_last_line(done.stderr)}")
    return read_figures(done.stdout)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no message"


def read_figures(output: str) -> Figures:
    """Find the line of figures in what a cell printed."""
    lines = [line for line in output.splitlines() if line.startswith(MARK)]
    if len(lines) != 1:
        raise CellError(f"printed {len(lines)} lines that start with {MARK!r}, expected one")
    figures = json.loads(lines[0].removeprefix(MARK))
    assert isinstance(figures, dict)
    return figures


def ratio(runs: Runs, reference: Runs, metric: str) -> Spread | None:
    """Compare two cells, round by round: the spread of runs / reference. None if no round has both."""
    pairs = zip(runs.rounds, reference.rounds, strict=False)
    return Spread.of(
        [_value(ours, metric) / _value(theirs, metric) for ours, theirs in pairs if ours and theirs]
    )


def _value(figures: Figures, metric: str) -> float:
    found = figures[metric]
    return statistics.median(found) if isinstance(found, list) else float(found)


def results(runs: Iterable[Runs]) -> list[dict[str, Any]]:
    """Return every cell as JSON: what it was told, what each round gave, or why it gave nothing."""
    return [
        {
            "name": each.cell.name,
            "settings": public(each.cell.settings),
            "not_run": each.not_run,
            "rounds": each.rounds,
        }
        for each in runs
    ]


def public(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the settings that are paths of this machine."""
    return {key: value for key, value in settings.items() if key not in ("model", "checkpoint", "data")}


def from_results(cells: Iterable[Mapping[str, Any]]) -> list[Runs]:
    """Read back what `results` wrote, to render it again."""
    return [
        Runs(Cell(each["name"], "", each["settings"]), list(each["rounds"]), each["not_run"])
        for each in cells
    ]

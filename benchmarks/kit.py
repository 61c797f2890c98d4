"""The suite `kit`: how long the conformance kit takes for each of our plugins, and for all mutants.

Each is a process of its own, from its start to its end, imports and worker processes included.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.runner import Cell, Runs, Say, run_rounds
from modq.registry import KNOWN_PACKAGES

MODULE = "benchmarks.kit_cell"

MUTANTS = "mutants"
WAYS = ("modq check", "pytest")
"""`modq check NAME`, and the plugin's conformance test, which has some more variants."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the suite's own arguments: none."""


def run(given: argparse.Namespace, model: Path, work: Path, say: Say) -> list[Runs]:
    """Time each plugin by each way, then the mutants, interleaved by rounds."""
    wanted = [(f"{way}, {name}", way, name) for name in sorted(KNOWN_PACKAGES) for way in WAYS]
    cells = [
        Cell(name, MODULE, {"way": way, "backend": backend}, None, {"OMP_NUM_THREADS": str(given.threads)})
        for name, way, backend in [*wanted, (MUTANTS, "pytest", MUTANTS)]
        if given.systems is None or name in given.systems
    ]
    return run_rounds(cells, given.rounds, work, timeout=given.timeout, say=say)

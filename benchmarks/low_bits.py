"""The suite `low_bits`: LoRA on bases of 2 to 8 bits, the result of ModuLoRA in small.

One recipe for all: rank 8 on every linear, AdamW, one window of 512 tokens a step out of US annual messages
of 1990-2008, each seen once. Perplexity before and after is of windows out of those of 2010-16.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.quality import add_calibration, prepare
from benchmarks.quality_systems import LOW_BITS, find
from benchmarks.runner import Cell, Runs, Say, run_rounds
from benchmarks.training import environment

MODULE = "benchmarks.low_bits_cell"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the suite's own arguments."""
    add_calibration(parser)
    parser.add_argument("--tokens", type=int, default=512, help="tokens a step (default: 512)")
    parser.add_argument("--steps", type=int, default=39, help="steps (default: 39, 20k tokens)")
    parser.add_argument("--windows", type=int, default=32, help="windows to score (default: 32)")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="the highest (default: 2e-4)")


def run(given: argparse.Namespace, model: Path, work: Path, say: Say) -> list[Runs]:
    """Prepare the bases, then score, train and score each, a seed a round."""
    wanted = [name for name in ("dense", *LOW_BITS) if given.systems is None or name in given.systems]
    prepared = prepare(model, [name for name in wanted if name != "dense"], given, work, say)
    failed = {each.cell.settings["system"]: each for each in prepared if each.not_run}
    cells = [_cell(name, model, given, work) for name in wanted if name not in failed]
    return [*failed.values(), *run_rounds(cells, given.rounds, work, timeout=given.timeout, say=say)]


def _cell(system: str, model: Path, given: argparse.Namespace, work: Path) -> Cell:
    found = find(system)
    settings = {
        "system": system,
        "setting": found.setting,
        "model": str(model),
        "checkpoint": str(model if system == "dense" else work / system),
        "threads": given.threads,
        "tokens": given.tokens,
        "steps": given.steps,
        "windows": given.windows,
        "learning_rate": given.learning_rate,
        "seed": 0,
    }
    return Cell(system, MODULE, settings, found.peer, environment(system, given.threads))

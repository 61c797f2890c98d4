"""The suite `quality`: what each quantizer costs a model, beside its own package and plain rounding.

Calibration: windows of 512 tokens out of US annual messages of 1947-2008. Scored: windows out of those
of 2010-16, the same for all. Dense float32 arithmetic everywhere but in the quantized layers themselves.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.quality_systems import SYSTEMS
from benchmarks.real_models import MODELS
from benchmarks.runner import Cell, Runs, Say, run_rounds
from benchmarks.training import environment

MODULE = "benchmarks.quality_cell"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the suite's own arguments."""
    add_calibration(parser)
    parser.add_argument("--windows", type=int, default=32, help="windows to score (default: 32)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a window (default: 512)")
    parser.add_argument(
        "--weights", choices=("smollm2", *MODELS), default="smollm2", help="of which model (default: smollm2)"
    )


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """Add what decides the quantized checkpoints; with another number use another --work folder."""
    parser.add_argument(
        "--calibration-windows", type=int, default=128, help="of 512 tokens to learn from (default: 128)"
    )


def run(given: argparse.Namespace, model: Path, work: Path, say: Say) -> list[Runs]:
    """Prepare each checkpoint, then score each: both are deterministic, so once."""
    if given.weights in MODELS:
        model = MODELS[given.weights]()
    systems = [name for name in SYSTEMS if given.systems is None or name in given.systems]
    prepared = prepare(model, systems, given, work, say)
    failed = {each.cell.settings["system"] for each in prepared if each.not_run}
    common = {"weights": given.weights, "windows": given.windows, "tokens": given.tokens}
    able = [_cell("score", name, model, given, work, **common) for name in systems if name not in failed]
    return [*prepared, *run_rounds(able, 1, work, timeout=given.timeout, say=say)]


def prepare(
    model: Path, systems: Iterable[str], given: argparse.Namespace, work: Path, say: Say
) -> list[Runs]:
    """Write the checkpoints of these systems into `work`, but for those that are there."""
    cells = [_cell("prepare", system, model, given, work) for system in systems]
    return run_rounds(cells, 1, work, timeout=given.timeout, say=say)


def _cell(job: str, system: str, model: Path, given: argparse.Namespace, work: Path, **more: Any) -> Cell:
    settings = {
        **more,
        "model": str(model),
        "threads": given.threads,
        "calibration_windows": given.calibration_windows,
        "job": job,
        "system": system,
        "setting": SYSTEMS[system].setting,
        "checkpoint": str(work / system),
    }
    return Cell(f"{job} {system}", MODULE, settings, SYSTEMS[system].peer, environment(system, given.threads))

"""The suite `nli`: does the quantized base cost quality on a real task? One recipe, several seeds.

Natural-language inference: does one sentence entail the other (see nli_data.py)? A round is a seed, which
sets the LoRA's initial factors and the order of the training examples, the same for every system; the
held-out examples are the same for all. The untrained base is scored too.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.nli_data import fetch
from benchmarks.quality import add_calibration, prepare
from benchmarks.quality_systems import LOW_BITS, find
from benchmarks.runner import Cell, Runs, Say, run_rounds
from benchmarks.training import environment

MODULE = "benchmarks.nli_cell"

COMPARED = ("modq", "dense", "bitsandbytes")
"""Always; those of LOW_BITS come with --low-bits."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the suite's own arguments."""
    add_calibration(parser)
    parser.add_argument("--train", type=int, default=400, help="training examples, seen once (default: 400)")
    parser.add_argument("--held-out", type=int, default=300, help="examples to score (default: 300)")
    parser.add_argument("--longest", type=int, default=56, help="tokens of the longest example (default: 56)")
    parser.add_argument("--low-bits", action="store_true", help="also bases of 2 to 8 bits, see `quality`")
    parser.add_argument("--batch-size", type=int, default=4, help="examples a step (default: 4)")
    parser.add_argument(
        "--learning-rate", type=float, default=1e-3, help="of AdamW, the highest (default: 1e-3)"
    )


def run(given: argparse.Namespace, model: Path, work: Path, say: Say) -> list[Runs]:
    """Score each system untrained, then train and score it once a seed."""
    common = {
        "model": str(model),
        "data": str(fetch()),
        "threads": given.threads,
        "dtype": "float32",
        "train": given.train,
        "held_out": given.held_out,
        "longest": given.longest,
        "batch_size": given.batch_size,
        "learning_rate": given.learning_rate,
    }
    wanted = (*COMPARED, *LOW_BITS) if given.low_bits else COMPARED
    systems = [system for system in wanted if given.systems is None or system in given.systems]
    prepared = prepare(model, [system for system in systems if system in LOW_BITS], given, work, say)
    untrained = [_cell(system, common, work, trained=False, seed=0) for system in systems]
    runs = run_rounds(untrained, 1, work, timeout=given.timeout, say=say)
    seeds = [
        run_rounds(
            [_cell(system, common, work, trained=True, seed=seed) for system in systems],
            1,
            work,
            timeout=given.timeout,
            say=lambda line, seed=seed: say(f"seed {seed}  {line.partition('  ')[2]}"),
        )
        for seed in range(given.rounds)
    ]
    failed = [each for each in prepared if each.not_run]
    return [*failed, *runs, *(_joined(of_system) for of_system in zip(*seeds, strict=True))]


def _joined(seeds: tuple[Runs, ...]) -> Runs:
    """Make the seeds the rounds of one cell."""
    reasons = [each.not_run for each in seeds if each.not_run]
    return Runs(seeds[0].cell, [each.rounds[0] for each in seeds], reasons[0] if reasons else None)


def _cell(system: str, common: dict[str, Any], work: Path, *, trained: bool, seed: int) -> Cell:
    found = find(system)
    settings = {
        **common,
        "system": system,
        "setting": found.setting,
        "checkpoint": str(work / system) if system in LOW_BITS else None,
        "trained": trained,
        "seed": seed,
    }
    return Cell(
        f"{system}, {'trained' if trained else 'untrained'}",
        MODULE,
        settings,
        found.peer,
        environment(system, common["threads"]),
    )

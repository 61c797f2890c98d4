"""The suite `layers`: the time that one linear takes to quantize, beside the algorithm's own package.

Weights are t-distributed, inputs correlated and of unequal size, both from a fixed seed: random matrices, of
the shapes of SmolLM2-135M and one larger. The Hessian is given; gathering it is not counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.runner import Cell, Runs, Say, run_rounds
from benchmarks.training import environment

MODULE = "benchmarks.layers_cell"

SHAPES = ((576, 576), (1536, 576), (576, 1536), (2048, 2048))
BITS = (4, 3, 2)


@dataclass(frozen=True, slots=True)
class Library:
    """Who quantizes: a function of layers_cell, and the environment that it runs in."""

    setting: str
    peer: str | None = None


LIBRARIES: Mapping[str, Library] = {
    "modq-optq": Library("group 64, asymmetric, order inside groups, damping 0.05"),
    "gptqmodel": Library("group 64, asymmetric, order inside groups, damping 0.05", "gptqmodel"),
    "modq-hqq": Library("group 64, axis 1, float16 scales"),
    "hqq": Library("group 64, axis 1, float16 scales", "hqq"),
}
PAIRS = {"modq-optq": "gptqmodel", "modq-hqq": "hqq"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the suite's own arguments."""
    parser.add_argument("--repetitions", type=int, default=3, help="of each layer in a round (default: 3)")


def run(given: argparse.Namespace, model: Path, work: Path, say: Say) -> list[Runs]:
    """Time every library on every shape, interleaved by rounds."""
    cells = [
        Cell(
            name,
            MODULE,
            {
                "library": name,
                "setting": library.setting,
                "threads": given.threads,
                "repetitions": given.repetitions,
                "shapes": SHAPES,
                "bits": BITS,
            },
            library.peer,
            environment(name, given.threads),
        )
        for name, library in LIBRARIES.items()
        if given.systems is None or name in given.systems
    ]
    return run_rounds(cells, given.rounds, work, timeout=given.timeout, say=say)

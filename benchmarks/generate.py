"""The suite `generate`: how fast each base writes tokens, greedily and one sequence at a time.

The model has the sizes of TinyLlama 1.1B and was never trained: Gaussian weights, or random codes
(random_llama.py). Activations are bfloat16. The prompt is 16 random ids from a fixed seed; then come 32
tokens, a row each, which is where the size of the weights decides: all of them are read for every token.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.kernels_systems import MODQ
from benchmarks.random_llama import SHAPES
from benchmarks.runner import Cell, Runs, Say, run_rounds
from benchmarks.systems import SYSTEMS
from benchmarks.training import environment

MODULE = "benchmarks.generate_cell"
PROMPT_TOKENS = 16
TARGET_SHAPE = "tinyllama"


@dataclass(frozen=True, slots=True)
class Base:
    """How the linears are stored.

    Attributes:
        setting: in words for the table.
        backend: modq's quantizer; None where modq has no part in it.
        options: the quantizer's.
        target: how many times dense bfloat16's speed it must reach in TARGET_SHAPE; None if no one asks.
        packages: whose versions the results state.
    """

    setting: str
    backend: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    target: float | None = None
    packages: tuple[str, ...] = ()


def _ours(setting: str, name: str, target: float | None = None) -> Base:
    """Store the linears as the suite `kernels` stores the weight of this name."""
    backend, options = MODQ[name]
    return Base(setting, backend, options, target, ("modq", f"modq-{backend}"))


BASES: Mapping[str, Base] = {
    "dense": Base("bfloat16"),
    "affine-4": _ours("4 bits and a zero, groups of 128", "modq-affine-4", 3.0),
    "affine-2": _ours("2 bits and a zero, groups of 64", "modq-affine-2", 4.0),
    "nf4": _ours("NF4, blocks of 64, double quantization", "modq-nf4"),
    "quipsharp-2": _ours("2 bits, E8P", "modq-e8p"),
    "bitsandbytes": Base(
        f"of the dense weights, {SYSTEMS['bitsandbytes'].setting}",
        packages=SYSTEMS["bitsandbytes"].packages,
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the suite's own arguments."""
    parser.add_argument(
        "--shape", choices=SHAPES, default=TARGET_SHAPE, help=f"default: {TARGET_SHAPE}; only it has targets"
    )
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens to write (default: 32)")


def run(given: argparse.Namespace, model: Path, work: Path, say: Say) -> list[Runs]:
    """Make the checkpoints, once each, then generate from them in interleaved rounds."""
    wanted = [system for system in BASES if given.systems is None or system in given.systems]
    cells = [_cell("prepare", system, given, work) for system in wanted]
    prepared = run_rounds(cells, 1, work, timeout=given.timeout, say=say)
    able = [system for system, each in zip(wanted, prepared, strict=True) if each.not_run is None]
    measured = [_cell("generate", system, given, work) for system in able]
    return [*prepared, *run_rounds(measured, given.rounds, work, timeout=given.timeout, say=say)]


def _cell(job: str, system: str, given: argparse.Namespace, work: Path) -> Cell:
    base = BASES[system]
    settings = {
        "job": job,
        "system": system,
        "setting": base.setting,
        "backend": base.backend,
        "options": base.options,
        "packages": base.packages,
        "shape": given.shape,
        **asdict(SHAPES[given.shape]),
        "target": base.target if given.shape == TARGET_SHAPE else None,
        "dtype": "bfloat16",
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": given.new_tokens,
        "threads": given.threads,
        "model": str(work / f"generate-dense-{given.shape}"),  # what bitsandbytes quantizes
        "checkpoint": str(work / f"generate-{system}-{given.shape}"),
    }
    library = system if base.backend is None else "modq"
    return Cell(f"{job} {system}", MODULE, settings, None, environment(library, given.threads))

"""The suite `memory`: the peak of a whole process that trains LoRA for a step on a Llama of random codes.

The shapes are those of LLaMA 7B to 65B, with a vocabulary of 32000 and a head of its own in bfloat16. A
checkpoint is made of random bytes, a decoder layer at a time, so that no dense weight ever exists; the
process that is measured loads it, puts LoRA of rank 8 on every linear, and takes one step of AdamW: batch 1,
128 tokens, gradient checkpointing, float32 for the adapter. Pages of mapped files count as far as resident.
The environment has MALLOC_MMAP_THRESHOLD_, see below.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.random_llama import SHAPES
from benchmarks.runner import Cell, Runs, Say, run_rounds
from benchmarks.training import environment

MODULE = "benchmarks.memory_cell"
TOKENS = 128

MMAP_SWITCH, MMAP_THRESHOLD = "MALLOC_MMAP_THRESHOLD_", 1 << 18
"""Freed pieces of so many bytes go back to the system at once, as docs/guide/memory.md advises: by default
glibc keeps those of up to 32 MiB, between which gradients then come to lie."""


@dataclass(frozen=True, slots=True)
class Base:
    """How the frozen linears are stored, and the most gigabytes (10^9) that a step may take, by shape."""

    setting: str
    backend: str
    options: Mapping[str, Any] = field(default_factory=dict)
    targets: Mapping[str, float] = field(default_factory=dict)


_TWO_BITS = {"7b": 3.2, "13b": 5.4, "30b": 11.4, "65b": 21.8}

BASES: Mapping[str, Base] = {
    "affine-2": Base(
        "2 bits and a zero, groups of 128, float16 scales",
        "optq",
        {"bits": 2, "group_size": 128, "symmetric": False},
        _TWO_BITS,
    ),
    "quipsharp-2": Base("2 bits, E8P", "quipsharp", {"bits": 2}, _TWO_BITS),
    "nf4": Base("NF4, blocks of 64, double quantization", "nf4", {}, {"7b": 5.2, "13b": 8.6}),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the suite's own arguments."""
    parser.add_argument(
        "--shapes",
        type=lambda words: words.split(","),
        default=["7b"],
        help=f"of {','.join(SHAPES)} (default: 7b)",
    )
    parser.add_argument("--layers", type=int, help="decoder layers, to try it out; such runs have no target")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"a step's (default: {TOKENS})")


def run(given: argparse.Namespace, model: Path, work: Path, say: Say) -> list[Runs]:
    """Make each checkpoint, estimate it, and measure the step, interleaved by rounds."""
    wanted = [
        (system, shape, dtype)
        for shape in given.shapes
        for system in BASES
        if given.systems is None or system in given.systems
        for dtype in given.dtypes or ["bfloat16"]
    ]
    cells = [_cell("prepare", *which, given, work) for which in wanted]
    prepared = run_rounds(cells, 1, work, timeout=given.timeout, say=say)
    able = [which for which, each in zip(wanted, prepared, strict=True) if each.not_run is None]
    steps = [_cell("step", *which, given, work) for which in able]
    return [*prepared, *run_rounds(steps, given.rounds, work, timeout=given.timeout, say=say)]


def _cell(job: str, system: str, shape: str, dtype: str, given: argparse.Namespace, work: Path) -> Cell:
    base, whole = BASES[system], SHAPES[shape]
    sizes = replace(whole, layers=given.layers or whole.layers)
    settings = {
        "job": job,
        "system": system,
        "shape": shape,
        "setting": base.setting,
        "backend": base.backend,
        "options": base.options,
        **asdict(sizes),
        "target": base.targets.get(shape) if sizes == whole else None,
        "dtype": dtype,
        "tokens": given.tokens,
        "mmap_threshold": MMAP_THRESHOLD,
        "threads": given.threads,
        "checkpoint": str(work / f"memory-{system}-{shape}-{sizes.layers}"),
    }
    name = f"{job} {shape} {system}" + ("" if dtype == "bfloat16" else f" {dtype}")
    variables = {**environment("modq", given.threads), MMAP_SWITCH: str(MMAP_THRESHOLD)}
    return Cell(name, MODULE, settings, None, variables)

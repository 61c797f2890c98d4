"""The suite `kernels`: products with one quantized weight, and quantizing one, beside dense torch and peers.

Weights are random codes. A point is a shape, a number of rows of x, a direction and a dtype: `forward` is
x @ W.T, `dX` is grad @ W, `both` a forward with its backward through autograd. Each series of calls goes
around copies of the weight whose bytes are at least four times the last cache's, dense weights and the plain
read likewise, so that no weight is in the cache when its turn comes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.runner import Cell, Runs, Say, run_rounds
from benchmarks.training import environment

MODULE = "benchmarks.kernels_cell"

SHAPES = ("4096x4096", "11008x4096", "4096x11008")
"""(out)x(in). All of them are measured at one row, the first at every number of rows."""

ROWS = (1, 4, 16, 64, 256, 1024, 2048)
FEW_ROWS = 16
"""Up to here a product is bound by the reading of the weight."""

CACHES = 4
"""How many times the last cache the copies of a weight take up."""

LEAST_CALLS, LEAST_SECONDS, MOST_SECONDS = 15, 0.25, 2.0
"""A series has at least so many calls and takes at least so long, but ends soon after the most seconds."""

BF16, FP32 = "bfloat16", "float32"


@dataclass(frozen=True, slots=True)
class System:
    """Something that multiplies, or quantizes.

    Attributes:
        setting: what it is, in words for the report.
        plan: which points it is measured at; "quantize" for the time to quantize instead.
        peer: the environment it runs in; None is the project's own.
        one_row: how many times faster than dense bfloat16 it must be at one row.
    """

    setting: str
    plan: str
    peer: str | None = None
    one_row: float | None = None


_LLAMA = "llama.cpp's graph alone, x in place in float32, which it rounds to 8 bits"

SYSTEMS: Mapping[str, System] = {
    "read": System("the sum of an int64 tensor of a bfloat16 weight's bytes", "read"),
    "dense-bf16": System("torch, weight and x in bfloat16", "dense"),
    "dense-fp32": System("torch, weight and x in float32", "dense32"),
    "modq-nf4": System("NF4, blocks of 64, double quantization", "modq", one_row=4.5),
    "modq-affine-4": System("4 bits and a zero, groups of 128", "modq", one_row=4.8),
    "modq-affine-3": System("3 bits and a zero, groups of 128", "modq", one_row=5.5),
    "modq-affine-2": System("2 bits and a zero, groups of 64", "modq", one_row=8.0),
    "modq-affine-8": System("8 bits and a zero, groups of 128", "modq", one_row=2.2),
    "modq-e8p": System("QuIP#, 2 bits, E8P, Hadamard", "modq", one_row=3.0),
    "int4pack": System("torch's _weight_int4pack_mm_for_cpu, groups of 128", "forward"),
    "bitsandbytes-train": System(
        "NF4, blocks of 64, double quantization; dequantizes and multiplies", "peer"
    ),
    "bitsandbytes-eval": System("the same, packed for its kernel of AVX512-BF16", "forward"),
    "hqq": System("4 bits, groups of 128, axis 1", "peer", "hqq"),
    "gptqmodel": System("4 bits, groups of 128, its kernel in torch", "peer", "gptqmodel"),
    "llama-q4_0": System(f"Q4_0, repacked; {_LLAMA}", "forward", "llamacpp"),
    "llama-q2_k": System(f"Q2_K; {_LLAMA}", "forward", "llamacpp"),
    "llama-iq2_xxs": System(f"IQ2_XXS; {_LLAMA}", "forward", "llamacpp"),
    "quantize-modq-nf4": System("NF4, blocks of 64, double quantization", "quantize"),
    "quantize-bitsandbytes": System("NF4, blocks of 64, double quantization", "quantize"),
    "quantize-modq-hqq": System("4 bits, groups of 64, axis 1, float16 scales", "quantize"),
    "quantize-hqq": System("4 bits, groups of 64, axis 1, float16 scales", "quantize", "hqq"),
    "quantize-modq-e8p": System("QuIP#, 2 bits, E8P, no calibration", "quantize"),
}

FEW: Mapping[str, tuple[tuple[str, str], ...]] = {
    "dense": (("forward", BF16), ("dX", BF16)),
    "dense32": (("forward", FP32), ("dX", FP32), ("both", FP32)),
    "modq": (("forward", BF16), ("dX", BF16), ("both", FP32)),
    "forward": (("forward", BF16),),
    "peer": (("forward", BF16), ("both", FP32)),
}
"""By plan: the directions and dtypes of few rows."""

MANY: Mapping[str, tuple[tuple[str, str], ...]] = {
    "dense": (("forward", BF16), ("both", BF16)),
    "dense32": (("forward", FP32), ("both", FP32)),
    "modq": (("forward", BF16), ("both", BF16), ("forward", FP32), ("both", FP32)),
    "forward": (("forward", BF16),),
    "peer": (("forward", BF16), ("both", BF16), ("both", FP32)),
}
"""The same of many rows."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the suite's own arguments."""

    def shapes(words: str) -> list[str]:
        return [_shape(word) for word in words.split(",")]

    def rows(words: str) -> list[int]:
        return [int(word) for word in words.split(",")]

    parser.add_argument(
        "--shapes", type=shapes, default=list(SHAPES), help=f"OUTxIN,... (default: {','.join(SHAPES)})"
    )
    parser.add_argument("--rows", type=rows, default=list(ROWS), help="of x (default: %(default)s)")


def _shape(word: str) -> str:
    sizes = word.split("x")
    if len(sizes) != 2 or not all(size.isdecimal() for size in sizes):
        raise argparse.ArgumentTypeError(f"{word!r}, expected OUTxIN such as {SHAPES[0]}")
    return word


def run(given: argparse.Namespace, model: Path, work: Path, say: Say) -> list[Runs]:
    """Measure every system, interleaved by rounds."""
    cells = [
        _cell(name, system, given)
        for name, system in SYSTEMS.items()
        if given.systems is None or name in given.systems
    ]
    return run_rounds(cells, given.rounds, work, timeout=given.timeout, say=say)


def _cell(name: str, system: System, given: argparse.Namespace) -> Cell:
    settings: dict[str, Any] = {
        "system": name,
        "setting": system.setting,
        "plan": system.plan,
        "threads": given.threads,
        "caches": CACHES,
        "least_calls": LEAST_CALLS,
        "least_seconds": LEAST_SECONDS,
        "most_seconds": MOST_SECONDS,
        "points": list(points(system.plan, given.shapes, given.rows, given.dtypes)),
    }
    return Cell(
        name, MODULE, settings, system.peer, environment(name.removeprefix("quantize-"), given.threads)
    )


def points(plan: str, shapes: list[str], rows: list[int], dtypes: list[str] | None) -> Iterator[str]:
    """Yield "shape rows direction dtype" of what a plan measures, equal shapes and dtypes together."""
    if plan in ("read", "quantize"):
        yield from (f"{shape} 1 {plan} -" for shape in (shapes if plan == "read" else shapes[:1]))
        return
    found = [
        (number, shape, count, direction, dtype)
        for number, shape in enumerate(shapes)
        for count in rows
        for direction, dtype in (FEW if count <= FEW_ROWS else MANY)[plan]
        if number == 0 or (count == 1 and direction == "forward")
    ]
    for _, shape, count, direction, dtype in sorted(found, key=lambda each: (each[0], each[4], each[2])):
        if dtypes is None or dtype in dtypes:
            yield f"{shape} {count} {direction} {dtype}"

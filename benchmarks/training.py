"""The suite `training`: LoRA on one model through every system, for speed, memory and time to load.

The model is SmolLM2-135M with its channels rescaled (see modq.demo.weights), the text US annual messages;
LoRA of rank 8 on every linear, one window of 512 tokens a step, AdamW. Everything but the base is the same
for all: the same windows, the same initial factors, no trainer around the loop. A model without a tokenizer
(`--model`, see random_llama.py) trains on random ids.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.runner import Cell, Runs, Say, run_rounds
from benchmarks.systems import SYSTEMS

MODULE = "benchmarks.training_cell"

RANDOM_IDS = "random ids"
"""What a model without a tokenizer trains on."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured in one dtype.

    Attributes:
        systems: which ones.
        share: of a sequence's tokens and of the timed steps that the command line asks for.
    """

    systems: tuple[str, ...]
    share: float = 1.0


PLANS = {
    "float32": Plan(("dense", "bitsandbytes", "modq", "hqq", "gptqmodel")),
    # A processor without bfloat16 emulates it, some ten times slower.
    "bfloat16": Plan(("dense", "bitsandbytes", "modq"), share=0.25),
}

CHECKPOINTING = {"off": (False,), "on": (True,), "both": (False, True)}
"""Whether the layers' activations are computed anew in the backward pass, as the command line says it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the suite's own arguments."""
    parser.add_argument("--batch", type=int, default=1, help="sequences a step (default: 1)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens a sequence (default: 512)")
    parser.add_argument("--checkpointing", choices=CHECKPOINTING, default="both", help="default: both")
    parser.add_argument("--steps", type=int, default=3, help="timed steps a round (default: 3)")
    parser.add_argument("--warm-steps", type=int, default=1, help="steps before them (default: 1)")


def run(given: argparse.Namespace, model: Path, work: Path, say: Say) -> list[Runs]:
    """Prepare the checkpoints, once each, then train from them in interleaved rounds."""
    from benchmarks.lora import has_tokenizer  # imports peft: not on the way to --help

    common = {
        "model": str(model),
        "threads": given.threads,
        "seed": 0,
        "text": "US annual messages" if has_tokenizer(model) else RANDOM_IDS,
        "batch": given.batch,
        "tokens": given.tokens,
        "steps": given.steps,
        "warm_steps": given.warm_steps,
        "learning_rate": 2e-4,
    }
    wanted = [
        cell
        for cell in cells(common, CHECKPOINTING[given.checkpointing], work)
        if given.systems is None or cell.settings["system"] in given.systems
    ]
    wanted = [cell for cell in wanted if given.dtypes is None or cell.settings["dtype"] in given.dtypes]
    say("preparing the checkpoints")
    prepared = run_rounds(
        [cell for cell in wanted if cell.settings["job"] == "prepare"],
        1,
        work,
        timeout=given.timeout,
        say=say,
    )
    failed = {each.cell.settings["checkpoint"]: each.not_run for each in prepared if each.not_run}
    measured = [cell for cell in wanted if cell.settings["job"] != "prepare"]
    without = [cell for cell in measured if _needed(cell) in failed]
    able = [cell for cell in measured if cell not in without]
    return [
        *prepared,
        *run_rounds(able, given.rounds, work, timeout=given.timeout, say=say),
        *(Runs(cell, [], failed[_needed(cell)]) for cell in without),
    ]


def _needed(cell: Cell) -> str:
    """The checkpoint that a cell loads; none if it quantizes the dense one."""
    return str(cell.settings["checkpoint"]) if cell.settings["job"] == "train" else ""


def cells(common: dict[str, Any], checkpointing: Sequence[bool], work: Path) -> Iterator[Cell]:
    """Yield every cell; those that are compared with one another run one after another."""
    for dtype, plan in PLANS.items():
        tokens, steps = (max(1, int(plan.share * common[key])) for key in ("tokens", "steps"))
        shared = {**common, "dtype": dtype, "tokens": tokens, "steps": steps}
        for system in plan.systems:
            yield _cell("prepare", system, False, shared, work)
        for wanted in checkpointing:
            for system in plan.systems:
                yield _cell("train", system, wanted, shared, work)
    for system in PLANS["float32"].systems:
        if SYSTEMS[system].quantize is not None:
            yield _cell("quantize", system, False, {**common, "dtype": "float32"}, work)


def _cell(job: str, system: str, checkpointing: bool, common: dict[str, Any], work: Path) -> Cell:
    dtype = common["dtype"]
    settings = {
        **common,
        "job": job,
        "system": system,
        "setting": SYSTEMS[system].setting,
        "checkpointing": checkpointing,
        "checkpoint": str(work / f"{Path(common['model']).name}-{system}-{dtype}"),
    }
    suffix = ", checkpointing" if checkpointing else ""
    return Cell(
        f"{job} {system} {dtype}{suffix}",
        MODULE,
        settings,
        SYSTEMS[system].peer,
        environment(system, common["threads"]),
    )


def environment(system: str, threads: int) -> dict[str, str]:
    """Return a cell's variables: nothing of modq runs in the others' processes."""
    others = {} if system.startswith("modq") else {"MODQ_AUTOLOAD": "0"}
    workers = max(2, threads)  # gptqmodel fails with one
    return {"OMP_NUM_THREADS": str(threads), "GPTQMODEL_CPU_WORKERS": str(workers), **others}

"""Prints what the demo measured as one short table, and what to do next."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from modq.demo.run import Outcome
    from modq.train.progress import Progress

NEXT = (
    "modq quantize MODEL my-model --backend nf4 --set double_quant=true",
    "modq finetune my-model --data train.jsonl --output my-adapter",
    "modq eval my-model --adapter my-adapter --text held-out.txt",
)
"""How to go on with one's own model; a test runs them through the command line's parser."""


def show_progress(progress: Progress) -> None:
    """Print the training loss of every fourth step."""
    if progress.step % 4 == 0:
        print(f"  step {progress.step}/{progress.steps}  loss {progress.loss:.3f}", flush=True)


def show(outcome: Outcome, console: Console | None = None) -> None:
    """Print the table, what the model says before and after, and the commands."""
    console = console or Console(highlight=False)
    console.print(_table(outcome))
    console.print(f"before: {outcome.sample_before} …", markup=False)
    console.print(f"after:  {outcome.sample_after} …", markup=False)
    console.print("\nWith your own model (a folder or a name on the hub) and data:")
    for command in NEXT:
        console.print(f"  {command}", markup=False, soft_wrap=True)


def _table(outcome: Outcome) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("", "before", "after"):
        table.add_column(heading)
    sizes, before, after, trained = outcome.sizes, outcome.before, outcome.after, outcome.trained
    gain = after.gain_over(before)
    table.add_row("held-out perplexity", str(before.perplexity), str(after.perplexity))
    table.add_row("held-out loss (nats)", str(before.nll), str(after.nll))
    table.add_row(f"  paired, {len(after.window_nll)} windows", "", f"{-gain.mean:.3f} ± {gain.stderr:.2g}")
    table.add_row("", "", f"{gain.stderrs_from_zero:.1f} standard errors", end_section=True)
    table.add_row("model", f"{_mb(sizes.dense)} dense", f"{_mb(sizes.held)} quantized")
    table.add_row("  its linears", "32 bits a weight", _bits(sizes.bits_per_weight))
    table.add_row("adapter", "", f"{_mb(outcome.adapter_bytes)}, {trained.trainable_parameters:,} parameters")
    table.add_row("peak memory (RSS)", "", f"{_mb(outcome.peak_rss)}, torch included")
    table.add_row("time", "", f"{trained.seconds:.0f} s training, {outcome.seconds:.0f} s in all")
    return table


def _mb(nbytes: float) -> str:
    return f"{nbytes / 1e6:.1f} MB"


def _bits(bits_per_weight: float | None) -> str:
    return "nothing quantized" if bits_per_weight is None else f"{bits_per_weight:.2f} bits a weight"

"""`modq estimate`: how much memory training takes, by part, before any weight is read."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import TYPE_CHECKING, Any

import click

from modq.cli.settings import backend_options, collect_options, dtype_option

if TYPE_CHECKING:
    from modq.estimate import Estimate

SCHEMA = 1
"""The version of the --json document."""

POSITIVE = click.IntRange(min=1)

MEANING = {
    "codes": "the quantized linears",
    "scales": "their scales, zeros and the like",
    "dense": "embeddings, head, norms, linears that are not quantized",
    "adapter": "its weights",
    "gradients": "the adapter's",
    "optimizer": "its states",
    "activations": "kept for the backward pass, and passing through",
    "logits": "and the loss, where the peak is there",
    "casting": "while loading: dense tensors in both dtypes, above all the rest",
    "workspace": "dense weights, a block at a time",
    "process": "Python and the libraries, measured",
}


@click.command("estimate")
@click.argument("model")
@backend_options(required=False)
@dtype_option
@click.option("--batch", type=POSITIVE, default=4, show_default=True, help="Examples a batch.")
@click.option(
    "--length", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens an example."
)
@click.option("--r", type=POSITIVE, default=8, show_default=True, help="Rank of the adapter.")
@click.option("--target-modules", help="Names of linears, with commas between; by default all but the head.")
@click.option("--optim", default="adamw_torch", show_default=True, help="By its name in transformers.")
@click.option(
    "--adapter-dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Of the adapter, its gradients and the optimizer's states.",
)
@click.option(
    "--gradient-checkpointing/--no-gradient-checkpointing",
    default=True,
    show_default=True,
    help="Compute activations twice instead of keeping them.",
)
@click.option(
    "--trainer/--plain-loop",
    default=True,
    show_default=True,
    help="As `modq finetune` trains, or in a loop of your own over `model(...).loss`.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document, in bytes.")
def command(
    model: str,
    backend: str | None,
    bits: int | None,
    group_size: int | None,
    settings: tuple[str, ...],
    dtype: str,
    target_modules: str | None,
    as_json: bool,
    **training: Any,
) -> None:
    """Predict the memory that training an adapter on MODEL takes on a CPU, by part. No weight is read.

    MODEL is a folder with a config.json, or a name on the hub. If it is quantized already, leave --backend
    out; with --backend it is what the model quantized by that takes, loaded from its own checkpoint.

    GB are 10^9 bytes of resident memory at the peak of a step, mapped files as far as they are read. It runs
    the step on tensors without content, which takes up to a second for each layer.
    """
    options = collect_options(backend, bits, group_size, settings)
    targets = tuple(target_modules.split(",")) if target_modules else "all-linear"
    from modq.train.quiet import quiet  # imports torch, as does the next

    with quiet(), contextlib.redirect_stdout(sys.stderr):  # what a library prints would break the document
        from modq.estimate import Training, estimate

        asked = Training(**training, target_modules=targets)
        found = estimate(model, asked, backend=backend, options=options, dtype=dtype)
    click.echo(_document(model, found) if as_json else _lines(found))


def _document(model: str, found: Estimate) -> str:
    content = {"schema": SCHEMA, "model": model, "parts": found.parts, "total": found.total}
    return json.dumps(content, indent=2)


def _lines(found: Estimate) -> str:
    rows = [f"{name:<12}{_gigabytes(size)}  {MEANING[name]}" for name, size in found.parts.items()]
    return "\n".join([*rows, f"{'total':<12}{_gigabytes(found.total)}"])


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:>8.3f} GB"

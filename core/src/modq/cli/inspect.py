"""`modq inspect`: what a model is, how it is quantized and what it will hold, without loading it."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict

import click

from modq.cli.settings import megabytes

SCHEMA = 1
"""The version of the --json document."""


@click.command("inspect")
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(model: str, as_json: bool) -> None:
    """Say what MODEL is: its quantizers and options, bits a weight, sizes. No weight is read."""
    from modq.train.quiet import quiet  # imports torch, as does the next

    with quiet(), contextlib.redirect_stdout(sys.stderr):  # what a library prints would break the document
        from modq.train.inspect import inspect_model

        found = inspect_model(model)
    if as_json:
        click.echo(json.dumps({"schema": SCHEMA, "model": model, **asdict(found)}, indent=2))
        return
    click.echo(f"model      {found.architecture}, {found.parameters:,} parameters, {found.dtype}")
    click.echo(f"quantized  {found.quant_method or 'no'}")
    click.echo(f"size       {megabytes(found.sizes.dense)} dense, {megabytes(found.sizes.held)} as it is")
    for scheme in found.schemes:
        options = ", ".join(f"{key}={value}" for key, value in scheme.options.items())
        by = f"{scheme.backend} ({scheme.package} {scheme.version})"
        click.echo(f"           {scheme.layers} linears by {by}, {scheme.bits_per_weight:.3f} bits a weight")
        click.echo(f"           {options}")

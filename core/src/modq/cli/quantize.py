"""`modq quantize`: a dense model in, a prequantized checkpoint out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from modq.cli.settings import backend_options, collect_options, dtype_option, megabytes


@click.command("quantize")
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@backend_options(required=True)
@dtype_option
def command(model: str, out: Path, backend: str, dtype: str, **given: Any) -> None:
    """Quantize MODEL while loading it and write it, with its tokenizer, to the new folder OUT."""
    options = collect_options(backend, **given)
    from modq.train.folders import require_free

    require_free(out)
    from modq.train.quiet import quiet  # imports torch, as does the next

    with quiet():
        from modq.train.models import quantize_folder

        sizes, seconds = quantize_folder(model, out, backend=backend, options=options, dtype=dtype)
    bits = "-" if sizes.bits_per_weight is None else f"{sizes.bits_per_weight:.2f} bits a weight"
    click.echo(f"wrote      {out}")
    click.echo(f"quantized  {sizes.quantized_layers} linears with {backend}, {bits}")
    click.echo(f"size       {megabytes(sizes.dense)} dense, {megabytes(sizes.held)} quantized")
    click.echo(f"took       {seconds:.1f} s")

"""`modq quantize`: a dense model in, a prequantized checkpoint out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from modq.cli.settings import backend_options, collect_options, dtype_option, megabytes
from modq.errors import OptionError
from modq.registry import describe_backend


@click.command("quantize")
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@backend_options(required=True)
@dtype_option
@click.option("--format", help="Write another package's format, of those that the backend knows.")
def command(model: str, out: Path, backend: str, dtype: str, format: str | None, **given: Any) -> None:
    """Quantize MODEL while loading it and write it, with its tokenizer, to the new folder OUT."""
    options = collect_options(backend, **given)
    from modq.train.folders import require_free

    require_free(out)
    _check_format(backend, format)
    from modq.train.quiet import quiet  # imports torch, as does the next

    with quiet():
        from modq.train.models import quantize_folder

        sizes, seconds = quantize_folder(
            model, out, backend=backend, options=options, dtype=dtype, format=format
        )
    bits = "-" if sizes.bits_per_weight is None else f"{sizes.bits_per_weight:.2f} bits a weight"
    click.echo(f"wrote      {out}")
    click.echo(f"quantized  {sizes.quantized_layers} linears with {backend}, {bits}")
    click.echo(f"size       {megabytes(sizes.dense)} dense, {megabytes(sizes.held)} quantized")
    click.echo(f"took       {seconds:.1f} s")


def _check_format(backend: str, format: str | None) -> None:
    """Refuse a format that the backend does not write, before anything slow begins."""
    known = [written.name for written in describe_backend(backend).formats]
    if format is not None and format not in known:
        raise OptionError(
            f"backend {backend!r} does not write format {format!r}; it writes {', '.join(known) or 'none'}"
        )

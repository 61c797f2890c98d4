"""The options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from modq.options import build_options, parse_settings

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

dtype_option = click.option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
    default="auto",
    show_default=True,
    help="Of what is not quantized; auto keeps the checkpoint's.",
)


def backend_options(*, required: bool) -> Decorator:
    """Add --backend, --bits, --group-size and --set."""
    options = (
        click.option("--backend", required=required, help="The quantizer; `modq list-backends` names them."),
        click.option("--bits", type=int, help="Short for the backend's own option."),
        click.option("--group-size", type=int, help="Short for the backend's own option."),
        click.option(
            "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any other option of the backend."
        ),
    )

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def collect_options(
    backend: str | None, bits: int | None, group_size: int | None, settings: tuple[str, ...]
) -> dict[str, Any]:
    """Put the options of a backend together and have the backend check them, before anything slow begins."""
    given = {"bits": bits, "group_size": group_size}
    options = {name: value for name, value in given.items() if value is not None} | parse_settings(settings)
    if backend is None:
        if options:
            raise click.UsageError(f"{', '.join(options)} set without --backend")
        return {}
    build_options(backend, options)
    return options


def megabytes(nbytes: float) -> str:
    """Spell a size: `55.1 MB`."""
    return f"{nbytes / 1e6:.1f} MB"

"""What several commands share: their options, and how they spell things."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import click
from click.shell_completion import CompletionItem

from modq.options import build_options, parse_settings
from modq.registry import Status, list_backends

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

dtype_option = click.option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
    default="auto",
    show_default=True,
    help="Of what is not quantized; auto keeps the checkpoint's.",
)


layers_option = click.option(
    "--layers",
    nargs=2,
    multiple=True,
    metavar="REGEX HOW",
    help="Quantize the linears of these names otherwise, see above; may be repeated.",
)


def complete_backend(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Name the usable backends that begin so; no torch is imported for that."""
    return [
        CompletionItem(backend.name, help=backend.info.summary if backend.info else None)
        for backend in list_backends()
        if backend.status is Status.OK and backend.name.startswith(incomplete)
    ]


def backend_options(*, required: bool) -> Decorator:
    """Add --backend, --bits, --group-size and --set."""
    options = (
        click.option(
            "--backend",
            required=required,
            shell_complete=complete_backend,
            help="The quantizer; `modq list-backends` names them.",
        ),
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


def collect_layers(
    backend: str, options: Mapping[str, Any], given: Iterable[tuple[str, str]]
) -> dict[str, dict[str, Any] | None]:
    """Turn `--layers REGEX HOW` into overrides as the library has them, checked.

    HOW is `dense`, or settings with commas between, of which the first may be the name of a backend.
    """
    layers: dict[str, dict[str, Any] | None] = {}
    for pattern, how in given:
        first, *others = how.split(",")
        if how == "dense":
            layers[pattern] = None
        elif "=" in first:
            layers[pattern] = parse_settings([first, *others])
        else:
            layers[pattern] = {"backend": first, **parse_settings(others)}
    if layers:
        from modq.model import Recipe  # imports torch: what is wrong without --layers shall show at once

        Recipe(backend, options, layers).check()
    return layers


def kind_of_name(name: str) -> str:
    """Put `*` for the numbers in a module's name: `model.layers.*.mlp.up_proj`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def megabytes(nbytes: float) -> str:
    """Spell a size: `55.1 MB`."""
    return f"{nbytes / 1e6:.1f} MB"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows of one length, the first of them the header.

    By hand: importing rich takes longer than all the rest of a command that prints a few lines.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)

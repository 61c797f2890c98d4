"""`modq inspect`: what a model or an adapter is and what it was made from, without loading it."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modq.cli.settings import kind_of_name, megabytes

if TYPE_CHECKING:
    from modq.train.inspect import Inspection
    from modq.train.inspect_adapter import AdapterInspection

SCHEMA = 1
"""The version of the --json document."""


@click.command("inspect")
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(path: str, as_json: bool) -> None:
    """Say what PATH is, a model or the folder of an adapter. No weight is read.

    Of a model: its quantizers and options, bits a weight, sizes. Of an adapter: its rank and size, and the
    base that it was trained on. A model may be one on the hub, too.
    """
    from modq.train.quiet import quiet  # imports torch, as do those below

    with quiet(), contextlib.redirect_stdout(sys.stderr):  # what a library prints would break the document
        from modq.train.inspect import inspect_model
        from modq.train.inspect_adapter import inspect_adapter, is_adapter

        kind = "adapter" if is_adapter(path) else "model"
        found: Any = inspect_adapter(Path(path)) if kind == "adapter" else inspect_model(path)
    if as_json:
        click.echo(json.dumps({"schema": SCHEMA, kind: path, **asdict(found)}, indent=2))
    else:
        click.echo("\n".join(_adapter_lines(found) if kind == "adapter" else _model_lines(found)))


def _model_lines(found: Inspection) -> list[str]:
    lines = [
        f"model      {found.architecture}, {found.parameters:,} parameters, {found.dtype}",
        f"quantized  {found.quant_method or 'no'}",
        f"size       {megabytes(found.sizes.dense)} dense, {megabytes(found.sizes.held)} as it is",
    ]
    for scheme in found.schemes:
        by = f"{scheme.backend} ({scheme.package} {scheme.version})"
        lines.append(
            f"           {scheme.layers} linears by {by}, {scheme.bits_per_weight:.3f} bits a weight"
        )
        lines.append(f"           {_spelled(scheme.options)}")
    return [*lines, *_source_line(found.source)]


def _adapter_lines(found: AdapterInspection) -> list[str]:
    size = "unknown: no adapter_model.safetensors" if found.parameters is None else f"{found.parameters:,}"
    lines = [
        f"adapter    {found.method or 'of an unknown kind'}, rank {found.rank}, alpha {found.alpha}",
        f"targets    {', '.join(dict.fromkeys(map(kind_of_name, found.targets))) or '-'}",
        f"parameters {size}",
        f"base       {found.base_model or 'unknown'}",
    ]
    if found.base is None:
        return [*lines, "           dense, or not recorded: there is no modq.json"]
    for scheme in found.base.schemes:
        by = f"{scheme.backend} ({scheme.package} {scheme.version})"
        lines.append(f"           {scheme.layers} linears by {by}: {_spelled(scheme.options)}")
        lines.append(f"codes      {_hash(scheme.codes)}")
    return [*lines, *_source_line(found.base.source)]


def _spelled(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items())


def _source_line(source: str | None) -> list[str]:
    return [] if source is None else [f"source     {_hash(source)}"]


def _hash(digest: str | None) -> str:
    return "not recorded" if digest is None else f"sha256 {digest}"

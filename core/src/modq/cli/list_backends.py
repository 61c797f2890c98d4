"""`modq list-backends`: every declared quantizer and whether it can be used, without importing torch."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import click

import modq
from modq.cli.settings import table
from modq.registry import KNOWN_PACKAGES, Backend, Status, list_backends
from modq.spec import API_VERSION

SCHEMA = 1
"""The version of the --json document: it goes up when a key changes its meaning, not when one is added."""

HEADER = ("NAME", "STATUS", "BITS", "CALIBRATION", "PACKAGE", "SUMMARY")


@click.command("list-backends")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--check", is_flag=True, help="Load each backend too: finds what cannot be seen from outside.")
@click.option("--strict", is_flag=True, help="As --check, and exit 1 if any is not ok.")
def command(as_json: bool, check: bool, strict: bool) -> None:
    """List the quantizers that are installed, and whether each can be used.

    Without --check no backend is loaded, so one that needs a missing library, or breaks the plugin contract,
    may be listed as ok. `modq check NAME` looks further: at what a backend computes.
    """
    with contextlib.redirect_stdout(sys.stderr):  # a plugin that prints at import would break the document
        backends = list_backends(check=check or strict)
    click.echo(json.dumps(_document(backends), indent=2) if as_json else _table(backends))
    if strict and any(backend.status is not Status.OK for backend in backends):
        click.get_current_context().exit(1)


def _document(backends: list[Backend]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "modq": modq.__version__,
        "api": _version(API_VERSION),
        "backends": [_record(backend) for backend in backends],
    }


def _record(backend: Backend) -> dict[str, Any]:
    """One backend as JSON; `info` is null where a plugin could not be read."""
    info = backend.info
    declared = info and {
        "summary": info.summary,
        "api": _version(info.api),
        "bits": list(info.bits),
        "calibration": info.calibration,
        "devices": list(info.devices),
        "formats": [format.name for format in info.formats],
    }
    return {
        "name": backend.name,
        "status": backend.status.value,
        "reason": backend.reason or None,
        "package": backend.package,
        "version": backend.version,
        "entry_point": backend.entry_point,
        "info": declared,
    }


def _version(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _table(backends: list[Backend]) -> str:
    if not backends:
        return f"no backend is installed; begin with `pip install {KNOWN_PACKAGES['nf4']}`"
    reasons = [f"{backend.name}: {backend.reason}" for backend in backends if backend.reason]
    shown = table([HEADER, *map(_row, backends)])
    return "\n".join([shown, *([""] if reasons else []), *reasons])


def _row(backend: Backend) -> tuple[str, ...]:
    info = backend.info
    bits = ", ".join(f"{width:g}" for width in info.bits) if info else "-"
    calibration, summary = (info.calibration, info.summary) if info else ("-", "-")
    return backend.name, backend.status.value, bits, calibration, backend.distribution, summary

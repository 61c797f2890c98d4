"""`modq doctor`: what is installed here, what serves what, and what to do where something is wrong."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from modq.cli.settings import table

if TYPE_CHECKING:
    from modq.doctor import Diagnosis


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(as_json: bool) -> None:
    """Look at this installation, and say what to do where something is wrong.

    It shows versions, devices, which kernel serves which layout on which device and why no faster one does,
    the backends with the outside kernels that they declare, and the environment variables that modq reads.
    Put it into a bug report: it names no file of yours, but prints what those variables are set to.
    """
    with contextlib.redirect_stdout(sys.stderr):  # a plugin that prints at import would break the document
        from modq.doctor import diagnose  # imports torch when it is called

        found = diagnose()
    click.echo(json.dumps(found.to_json(), indent=2) if as_json else "\n\n".join(_sections(found)))


def _sections(found: Diagnosis) -> Iterator[str]:
    yield f"modq {found.modq}, plugin API {found.api}, Python {found.python}, {found.platform}"
    packages = [(p.name, p.version or "-", p.wanted or "any", ", ".join(p.by)) for p in found.packages]
    yield table([("PACKAGE", "VERSION", "WANTED", "BY"), *packages])
    if found.devices:
        yield table([("DEVICE", "NAME", "DETAIL"), *((d.device, d.name, d.detail) for d in found.devices)])
    if found.kernels:
        kernels = [(k.layout, k.device, k.kernel, k.faster) for k in found.kernels]
        yield table([("LAYOUT", "DEVICE", "KERNEL", "WHY NO FASTER ONE"), *kernels])
    if found.crossings:
        yield table(
            [("MEASURED HERE", "FUSED UP TO ROWS"), *((k, str(n)) for k, n in found.crossings.items())]
        )
    yield _backends(found)
    switches = [(s.name, "-" if s.value is None else repr(s.value), s.meaning) for s in found.switches]
    yield table([("SWITCH", "VALUE", "MEANING"), *switches])
    yield "\n".join(["TO DO", *found.todo] if found.todo else ["Nothing is wrong."])


def _backends(found: Diagnosis) -> str:
    rows = [("BACKEND", "STATUS", "PACKAGE", "LAYOUTS", "PRODUCTS BY")]
    for its in found.backends:
        layouts, package = ", ".join(its.layouts) or "-", f"{its.package} {its.version}"
        rows.append((its.name, its.status, package, layouts, its.products or "-"))
    providers = [
        f"{p.backend}: {p.name} ({p.module}, for {p.layout}) is {'used' if p.used else 'not used'}: {p.why}"
        for p in found.providers
    ]
    return "\n".join([table(rows), *providers])

"""`modq check`: whether a quantizer backend keeps what it promises, without pytest."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import click

from modq.cli.settings import complete_backend
from modq.errors import BackendError
from modq.options import build_options, parse_settings
from modq.registry import find

if TYPE_CHECKING:
    from modq.testing import Check, Subject
    from modq.testing.report import Result

COLOURS = {"FAILED": "red", "passed": "green"}


@click.command("check")
@click.argument("name", shell_complete=complete_backend)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="An option of the backend. All that are given make one more way to quantize, beside the defaults.",
)
@click.option(
    "--only", multiple=True, metavar="CHECK", help="Run this check, or group of checks; may be repeated."
)
def command(name: str, as_json: bool, settings: tuple[str, ...], only: tuple[str, ...]) -> None:
    """Check that the installed backend NAME keeps what modq promises of every quantizer.

    Each check is one promise: that `describe` tells the truth, that products are as close as dense ones, that
    nothing dense is kept for the backward pass, that saving changes no bit. What is not kept is said with the
    quantity and the numbers. The backend is checked with the default options at each width that it declares,
    and with those of --set.

    Exit code 1 if a check failed. One that the backend makes no promise for, or that is newer than the plugin
    API that it declares, does not count as failed.
    """
    with _no_output():  # a plugin may print as soon as it is imported
        backend = find(name)
        subject, checks = _prepare(name, parse_settings(settings), only)
        from modq.testing import report  # imports torch, as what follows does

    results: list[Result] = []
    for result in _run(subject, checks):
        if not as_json:
            _show(report.lines_of(result), heading=_heading(result, results))
        results.append(result)
    if as_json:
        click.echo(json.dumps(report.document_of(backend, subject, results), indent=2))
    else:
        _show(report.summary_of(backend, results), heading="")
    if any(result.failed for result in results):
        click.get_current_context().exit(1)


def _prepare(name: str, further: dict[str, Any], only: Sequence[str]) -> tuple[Subject, list[Check]]:
    """Choose the checks and load the backend."""
    build_options(name, further)  # what is wrong with them shall show before anything slow begins
    from modq.testing import Breach, Subject  # imports torch
    from modq.testing.checks import all_checks

    checks = _chosen(list(all_checks().values()), only)
    try:
        return Subject(name, [further] if further else []), checks
    except Breach as breach:
        raise BackendError(f"backend {name!r} cannot be checked: {breach}") from None


def _chosen(checks: list[Check], only: Sequence[str]) -> list[Check]:
    """Return the checks of these names and groups, all if none is given."""
    known = list(dict.fromkeys([*(check.group for check in checks), *(check.name for check in checks)]))
    for asked in only:
        if asked not in known:
            near = get_close_matches(asked, known, n=3) or dict.fromkeys(check.group for check in checks)
            raise click.UsageError(f"there is no check {asked!r}; there is {', '.join(near)}")
    return [check for check in checks if not only or {check.name, check.group} & set(only)]


def _run(subject: Subject, checks: Sequence[Check]) -> Iterator[Result]:
    from modq.testing.report import run_checks
    from modq.train.quiet import quiet

    results = run_checks(subject, checks)
    while True:
        with _no_output(), quiet():
            result = next(results, None)
        if result is None:
            return
        yield result


@contextmanager
def _no_output() -> Iterator[None]:
    """Send to stderr what a plugin, or a process that a check starts, prints: stdout is the report's."""
    sys.stdout.flush()
    kept = None
    with suppress(OSError):  # there is no stdout: it was closed
        kept = os.dup(1)
        os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        if kept is not None:
            os.dup2(kept, 1)
            os.close(kept)


def _heading(result: Result, before: Sequence[Result]) -> str | None:
    """Name the group at its first check."""
    group = result.outcome.check.group
    return None if before and before[-1].outcome.check.group == group else group


def _show(lines: Sequence[str], heading: str | None) -> None:
    if heading is not None:
        click.secho(heading, bold=True)
    for line in lines:
        verdict = line.split(maxsplit=1)[0] if line.strip() else ""
        click.echo(click.style(line, fg=COLOURS.get(verdict)))

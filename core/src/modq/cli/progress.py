"""Shows on stderr how far a command is: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

SECONDS_A_LINE = 10.0
"""How often a line is written where there is no terminal."""

Show = Callable[[int, int, str], None]
"""Called with how much is done, of how much, and what to say about it."""


@contextmanager
def showing_progress(noun: str) -> Iterator[Show]:
    """Yield what shows progress; `noun` is what is counted, as in `step 3/10`."""
    if not sys.stderr.isatty():
        yield _lines(noun)
        return
    from rich.console import Console  # late: other commands shall not wait for it
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as bar:
        task = bar.add_task("loading", total=None)
        yield lambda done, total, text: bar.update(task, completed=done, total=total, description=text)


def _lines(noun: str) -> Show:
    last = time.monotonic()
    first: tuple[int, float] | None = None  # a resumed run begins in the middle

    def show(done: int, total: int, text: str) -> None:
        nonlocal first, last
        now = time.monotonic()
        first = first or (done, now)
        if now - last < SECONDS_A_LINE and done != total:
            return
        last = now
        since, began = first
        left = (now - began) / (done - since) * (total - done) if done > since else None
        rest = "" if left is None else f"  {minutes(left)} left"
        click.echo(f"{noun} {done}/{total}  {text}{rest}", err=True)

    return show


def minutes(seconds: float) -> str:
    """Spell a duration: `3:07`, `1:03:07`."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"

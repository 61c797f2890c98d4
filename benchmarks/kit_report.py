"""Renders the results of the suite `kit`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.runner import Runs, Spread, from_results
from benchmarks.tables import shown, table


def render(results: Mapping[str, Any]) -> str:
    """Render the whole report in Markdown."""
    runs = from_results(results["cells"])
    rows = [
        [each.cell.name, shown(Spread.of(each.values("seconds")), 1), f"{each.values('passed')[0]:.0f}"]
        for each in runs
        if not each.not_run
    ]
    failed = [f"- not run: {each.cell.name}: {each.not_run}" for each in runs if each.not_run]
    return "\n\n".join([table(["run", "seconds", "checks passed"], rows), *failed])


def summary(runs: Sequence[Runs]) -> dict[str, Any]:
    """Say that no real model is in it."""
    return {"model": "Random matrices and tiny models"}

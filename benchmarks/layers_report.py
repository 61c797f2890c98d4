"""Renders the results of the suite `layers`: modq's time over its peer's, and both errors, by shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.layers import PAIRS
from benchmarks.runner import Runs, Spread, from_results, ratio
from benchmarks.tables import shown, table


def render(results: Mapping[str, Any]) -> str:
    """Render the whole report in Markdown."""
    runs = {each.cell.name: each for each in from_results(results["cells"])}
    parts = [
        table(
            [f"{ours} / {peer}", "ms", "peer's ms", "ratio of times", "output error, %", "peer's, %"],
            list(_rows(runs[ours], runs[peer])),
        )
        for ours, peer in PAIRS.items()
        if ours in runs and peer in runs
    ]
    parts += [f"{name}: {each.cell.settings['setting']}." for name, each in runs.items()]
    parts += [f"- not run: {name}: {each.not_run}" for name, each in runs.items() if each.not_run]
    return "\n\n".join(parts)


def _rows(ours: Runs, peer: Runs) -> Iterator[list[str]]:
    for key in _figures(ours):
        kind, _, layer = key.partition(" ")
        if kind == "seconds":
            yield [
                layer,
                shown(Spread.of(ours.values(key)), 1, 1e3),
                shown(Spread.of(peer.values(key)), 1, 1e3),
                shown(ratio(ours, peer, key)),
                f"{100 * _figures(ours)[f'error {layer}']:.2f}",
                f"{100 * _figures(peer).get(f'error {layer}', float('nan')):.2f}",
            ]


def _figures(runs: Runs) -> Mapping[str, Any]:
    return next((figures for figures in runs.rounds if figures), {})


def summary(runs: Sequence[Runs]) -> dict[str, Any]:
    """Say that no real model is in it."""
    return {"model": "Random linears"}

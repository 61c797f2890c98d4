"""Renders the results of the suite `low_bits`: a row a base, and where low bits lose, in words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.nli_report import NORMAL, stderr
from benchmarks.runner import Runs, Spread, from_results
from benchmarks.tables import shown, table

MB = 1e-6


def render(results: Mapping[str, Any]) -> str:
    """Render the whole report in Markdown."""
    runs = from_results(results["cells"])
    able = [each for each in runs if any(each.rounds)]
    first = _figures(able[0]) if able else {}
    parts = [
        f"{first.get('trained_tokens', 0)} tokens trained on; {len(first.get('before', []))} windows scored; "
        "perplexity ± one standard error, over windows; of the first round where there are several.",
        table(
            ["base", "bits a weight", "before", "after", "tokens/s", "peak MB", "above the model, MB"],
            [_row(each) for each in able],
        ),
        _against_dense(able),
        "\n".join(f"- not run: {each.cell.name}: {each.not_run}" for each in runs if each.not_run),
    ]
    return "\n\n".join(part for part in parts if part)


def _figures(each: Runs) -> Mapping[str, Any]:
    return next(figures for figures in each.rounds if figures)


def _row(each: Runs) -> list[str]:
    figures = _figures(each)
    bits = figures["bits_per_weight"]
    above = [
        peak - before
        for peak, before in zip(each.values("peak_bytes"), each.values("before_training_bytes"), strict=True)
    ]
    return [
        f"{each.cell.name} ({each.cell.settings['setting']})",
        "32" if bits is None else f"{bits:.2f}",
        _perplexity(figures["before"]),
        _perplexity(figures["after"]),
        shown(Spread.of(each.values("tokens_per_second")), 0),
        shown(Spread.of(each.values("peak_bytes")), 0, MB),
        shown(Spread.of(above), 0, MB),
    ]


def _perplexity(losses: Sequence[float]) -> str:
    perplexity = math.exp(statistics.fmean(losses))
    return f"{perplexity:.4g} ± {perplexity * stderr(losses):.2g}"


def _against_dense(able: Sequence[Runs]) -> str:
    """Compare each trained base with the trained dense one, and with the dense one as it came."""
    dense = next((each for each in able if each.cell.name == "dense"), None)
    if dense is None:
        return ""
    lines = []
    for each in able:
        if each is not dense:
            trained = _apart(_figures(each)["after"], _figures(dense)["after"])
            untrained = _apart(_figures(each)["after"], _figures(dense)["before"])
            lines.append(f"- {each.cell.name}, trained: {trained} trained dense, {untrained} untrained dense")
    return "\n".join(lines)


def _apart(ours: Sequence[float], theirs: Sequence[float]) -> str:
    apart = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, noise = statistics.fmean(apart), NORMAL * stderr(apart)
    if abs(mean) <= noise:
        return "no worse or better beyond noise than"
    return f"{abs(mean):.3f} nats a token {'worse' if mean > 0 else 'better'} than"


def summary(runs: Sequence[Runs]) -> dict[str, Any]:
    """Return what the results have on top of the cells: nothing."""
    return {}

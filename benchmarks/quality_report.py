"""Renders the results of the suite `quality`: a row a system, then modq beside each peer, window by window.

For two models with the losses a_i and b_i (nats a token) on the same n windows, their perplexities are in
the ratio exp(mean of a_i - b_i), and the standard error of its logarithm is that of the mean of differences.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.nli_report import stderr
from benchmarks.quality_systems import PAIRS
from benchmarks.runner import Runs, from_results
from benchmarks.tables import table

MODEL_NAMES = {
    "smollm2": "SmolLM2-135M-Instruct, channels rescaled",
    "gemma3": "Gemma 3 270M, channels rescaled",
    "minilm": "all-MiniLM-L6-v2 in float32, never quantized",
}

ALLOWED = 1.01
"""A perplexity within 1 % of the peer's is no worse."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """modq beside its peer: the ratio of perplexities, or of embedding errors, ours / theirs."""

    ours: str
    peer: str
    ratio: float
    stderr: float  # of the ratio, paired by window

    @property
    def holds(self) -> bool:
        """Whether modq is no worse than the peer."""
        return self.ratio <= ALLOWED


def scored(runs: Sequence[Runs]) -> dict[str, Mapping[str, Any]]:
    """Return the figures of each system that was scored."""
    return {
        each.cell.settings["system"]: each.rounds[0]
        for each in runs
        if each.cell.settings["job"] == "score" and each.rounds and each.rounds[0]
    }


def comparisons(runs: Sequence[Runs]) -> list[Comparison]:
    """Compare each of modq's systems with its peer, where both were scored."""
    found = scored(runs)
    return [
        _compare(ours, peer, found[ours], found[peer])
        for ours, peer in PAIRS.items()
        if ours in found and peer in found
    ]


def _compare(ours: str, peer: str, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> Comparison:
    apart = [a - b for a, b in zip(mine["scores"], theirs["scores"], strict=True)]
    if mine["kind"] == "nll":
        ratio = math.exp(statistics.fmean(apart))
        return Comparison(ours, peer, ratio, ratio * stderr(apart))
    whole = statistics.fmean(theirs["scores"])
    return Comparison(ours, peer, 1 + statistics.fmean(apart) / whole, stderr(apart) / whole)


def render(results: Mapping[str, Any]) -> str:
    """Render the whole report in Markdown."""
    runs = from_results(results["cells"])
    found = scored(runs)
    settings = {each.cell.settings["system"]: each.cell.settings for each in runs}
    kind = next(iter(found.values()))["kind"] if found else "nll"
    measure = "perplexity" if kind == "nll" else "embedding error, %"
    windows = len(next(iter(found.values()))["scores"]) if found else 0
    rows = [
        [f"{name} ({settings[name]['setting']})", _bits(name, figures), _shown(figures)]
        for name, figures in found.items()
    ]
    parts = [
        f"{windows} windows of {runs[-1].cell.settings['tokens']} tokens; ± one standard error. "
        f"Calibrated on {runs[-1].cell.settings['calibration_windows']} windows of 512 tokens.",
        table(["system", "bits a weight", measure], rows),
        _sentences(comparisons(runs), measure),
        "\n".join(f"- not run: {each.cell.name}: {each.not_run}" for each in runs if each.not_run),
    ]
    return "\n\n".join(part for part in parts if part)


def _bits(name: str, figures: Mapping[str, Any]) -> str:
    bits = figures["bits_per_weight"]
    return "-" if bits is None else f"{bits:.2f}"


def _shown(figures: Mapping[str, Any]) -> str:
    mean, spread = statistics.fmean(figures["scores"]), stderr(figures["scores"])
    if figures["kind"] == "nll":
        return f"{math.exp(mean):.4g} ± {math.exp(mean) * spread:.2g}"
    return f"{100 * mean:.3g} ± {100 * spread:.2g}"


def _sentences(found: Sequence[Comparison], measure: str) -> str:
    if not found:
        return ""
    rows = [
        [
            f"{each.ours} / {each.peer}",
            f"{each.ratio:.4f} ± {each.stderr:.4f}",
            "yes" if each.holds else "NO",
        ]
        for each in found
    ]
    name = measure.partition(",")[0]
    return table([f"ratio of {name}", "paired by window", f"at most {ALLOWED}"], rows)


def summary(runs: Sequence[Runs]) -> dict[str, Any]:
    """Return the comparisons as JSON, for the results, and which model they are of."""
    model = MODEL_NAMES[runs[-1].cell.settings["weights"]]
    return {
        "model": model,
        "comparisons": [{**asdict(each), "holds": each.holds} for each in comparisons(runs)],
    }

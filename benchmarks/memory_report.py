"""Renders the results of the suite `memory`: each step's peak beside its target and its estimate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.runner import Runs, Spread, from_results
from benchmarks.tables import shown, table

GB = 1e-9


def render(results: Mapping[str, Any]) -> str:
    """Render the whole report in Markdown."""
    runs = from_results(results["cells"])
    prepared = {_key(each): each for each in runs if each.cell.settings["job"] == "prepare"}
    steps = [each for each in runs if each.cell.settings["job"] == "step"]
    head = ["base", "peak, GB", "at most", "estimate, GB", "estimate / peak", "step, s", "loss", "files, GB"]
    rows = [_row(each, prepared[_key(each)]) for each in steps if not each.not_run]
    parts = [
        "One optimizer step of LoRA, rank 8, on all linears; the peak resident memory of the whole process, "
        "mapped pages included. GB are 10^9 bytes.",
        *_malloc(steps),
        table(head, rows),
        *_parts(prepared.values()),
        *dict.fromkeys(f"{each.cell.settings['system']}: {each.cell.settings['setting']}." for each in steps),
        *(f"- not run: {each.cell.name}: {each.not_run}" for each in runs if each.not_run),
    ]
    return "\n\n".join(parts)


def _malloc(steps: Sequence[Runs]) -> Iterator[str]:
    """Say what the C library was told, if it was."""
    for threshold in sorted({each.cell.settings.get("mmap_threshold", 0) for each in steps} - {0}):
        yield f"MALLOC_MMAP_THRESHOLD_ was {threshold}, as the guide to memory advises for large models."


def _key(runs: Runs) -> tuple[Any, ...]:
    told = runs.cell.settings
    return told["shape"], told["system"], told["dtype"]


def _name(runs: Runs) -> str:
    shape, system, dtype = _key(runs)
    told = runs.cell.settings
    return f"{shape} {system}, {told['layers']} layers" + ("" if dtype == "bfloat16" else f", {dtype}")


def _row(step: Runs, prepared: Runs) -> list[str]:
    told, peak = step.cell.settings, Spread.of(step.values("peak_bytes"))
    predicted = Spread.of(prepared.values("estimate_bytes"))
    ratio = f"{predicted.median / peak.median:.3f}" if peak and predicted else "-"
    return [
        _name(step),
        shown(peak, 2, GB),
        "-" if told["target"] is None else f"{told['target']:.1f} {_verdict(peak, told['target'])}",
        shown(predicted, 2, GB),
        ratio,
        shown(Spread.of(step.values("step_seconds")), 1),
        shown(Spread.of(step.values("loss")), 2),
        shown(Spread.of(prepared.values("checkpoint_bytes")), 2, GB),
    ]


def _verdict(peak: Spread | None, target: float) -> str:
    return "holds" if peak is not None and peak.high * GB <= target else "MISSED"


def _parts(prepared: Any) -> Iterator[str]:
    """Yield a table of the estimates' parts."""
    known = {_name(each): each.rounds[0]["parts"] for each in prepared if each.rounds and each.rounds[0]}
    if known:
        names = list(next(iter(known.values())))
        rows = [[name, *(f"{parts[part] * GB:.3f}" for part in names)] for name, parts in known.items()]
        yield "The estimate's parts, GB:"
        yield table(["base", *names], rows)


def summary(runs: Sequence[Runs]) -> dict[str, Any]:
    """Say that no real model is in it."""
    return {"model": "Random codes in the shapes of LLaMA"}

"""Renders the results of the suite `generate`: each base's speed beside dense bfloat16's and its target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.runner import Runs, Spread, from_results, ratio
from benchmarks.tables import shown, table

GB = 1e-9
SPEED = "tokens_per_second"


def render(results: Mapping[str, Any]) -> str:
    """Render the whole report in Markdown."""
    runs = from_results(results["cells"])
    prepared = {_system(each): each for each in runs if each.cell.settings["job"] == "prepare"}
    measured = [each for each in runs if each.cell.settings["job"] == "generate"]
    of_dense = {_system(each): _of_dense(each, measured) for each in measured if each.values(SPEED)}
    head = ["base", "tokens/s", "of dense", "target", "first token, s", "peak, GB", "load, s", "files, GB"]
    rows = [
        _row(each, of_dense[_system(each)], prepared.get(_system(each)))
        for each in measured
        if _system(each) in of_dense
    ]
    parts = [
        *(_note(each.cell.settings) for each in measured[:1]),
        table(head, rows),
        _targets(measured, of_dense),
        "\n".join(f"- not run: {each.cell.name}: {each.not_run}" for each in runs if each.not_run),
    ]
    return "\n\n".join(part for part in parts if part)


def _system(each: Runs) -> str:
    return str(each.cell.settings["system"])


def _of_dense(each: Runs, measured: Sequence[Runs]) -> Spread | None:
    """Compare the speed with dense's, round by round; None where dense did not run."""
    dense = next((other for other in measured if _system(other) == "dense"), None)
    return None if dense is None else ratio(each, dense, SPEED)


def _note(told: Mapping[str, Any]) -> str:
    return (
        f"A Llama of {told['layers']} layers, hidden size {told['hidden']}, that was never trained: dense "
        "weights are Gaussian, modq's codes are random bytes, so the text means nothing; the time does not "
        f"depend on it. Activations are {told['dtype']}; the prompt has {told['prompt_tokens']} tokens, "
        f"{told['new_tokens']} are written greedily, one sequence, with the key-value cache. Tokens/s are of "
        "the steps after the first token (their median, within a round). Peak memory is counted anew after "
        "loading; mapped files count as far as resident. Embeddings and head are bfloat16 in all of them. "
        "A target is held against the median of the rounds' ratios."
    )


def _row(each: Runs, of_dense: Spread | None, prepared: Runs | None) -> list[str]:
    told = each.cell.settings
    return [
        f"{told['system']} ({told['setting']})",
        shown(Spread.of(each.values(SPEED))),
        shown(of_dense),
        "-" if told["target"] is None else f"{told['target']:.1f} {_verdict(of_dense, told['target'])}",
        shown(Spread.of(each.values("first_token_seconds"))),
        shown(Spread.of(each.values("peak_bytes")), 2, GB),
        shown(Spread.of(each.values("load_seconds"))),
        shown(Spread.of(prepared.values("checkpoint_bytes")) if prepared else None, 2, GB),
    ]


def _verdict(of_dense: Spread | None, target: float) -> str:
    if of_dense is None:
        return "not compared"
    return "holds" if of_dense.median >= target else "MISSED"


def _targets(measured: Sequence[Runs], of_dense: Mapping[str, Spread | None]) -> str:
    """Say which targets are missed, and by how much."""
    asked = {_system(each): each.cell.settings["target"] for each in measured}
    targets = {system: target for system, target in asked.items() if target is not None}
    if not targets:
        return ""
    lines = list(_missed(targets, of_dense)) or ["- nowhere"]
    return "\n".join(["### Where a target is missed", "", *lines])


def _missed(targets: Mapping[str, float], of_dense: Mapping[str, Spread | None]) -> Iterator[str]:
    for system, target in targets.items():
        found = of_dense.get(system)
        if found is None:
            yield f"- {system}: not compared, for it or dense did not run"
        elif found.median < target:
            yield (
                f"- {system}: {shown(found)} times dense's speed, at least {target:.1f} wanted: "
                f"{100 * (1 - found.median / target):.0f} % short"
            )
        elif found.low < target:
            yield f"- {system}: only in some rounds, {shown(found)} times dense's speed, {target:.1f} wanted"


def summary(runs: Sequence[Runs]) -> dict[str, Any]:
    """Say that no real model is in it."""
    shapes = dict.fromkeys(each.cell.settings["shape"] for each in runs)
    return {"model": f"Random weights and codes in the shape {', '.join(shapes)}"}

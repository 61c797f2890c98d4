"""Renders the results of the suite `nli`: means over seeds, and whether a difference stands out of the noise.

With d_si the difference between two systems on held-out example i after training with seed s, n examples, k
seeds:

    difference = mean of d_si
    SE over seeds = std_s(mean_i d_si) / sqrt(k)        what another training would change
    SE over examples = std_i(mean_s d_si) / sqrt(n)     what another test set would change

A difference counts if it exceeds 1.96 SE over examples, or the t quantile (95 %, k - 1 degrees of freedom)
times the SE over seeds; "no difference beyond noise" is only said if it exceeds neither. If it exceeds but
one, the report says which: another training may turn round what only the examples say.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.runner import Runs, from_results
from benchmarks.tables import table

OURS = "modq"
NORMAL = 1.96
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}
"""The two-sided 95 % quantile of Student's t, by the number of seeds."""

METRICS = {"accuracy": "correct", "eval loss": "nats"}
"""The figure, and where a cell has it example by example."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A system less another."""

    metric: str
    ours: str
    against: str
    mean: float
    seed_stderr: float  # nan with one seed
    example_stderr: float
    seeds: int

    @property
    def exceeds(self) -> list[str]:
        """Which standard errors call it a difference."""
        by_examples = abs(self.mean) > NORMAL * self.example_stderr
        by_seeds = abs(self.mean) > STUDENT.get(self.seeds, math.inf) * self.seed_stderr
        return ["examples"] * by_examples + ["seeds"] * by_seeds


def differences(runs: Sequence[Runs]) -> list[Difference]:
    """Compare modq with every other library and its other bases with the dense one, after training.

    Seed by seed and example by example.
    """
    trained = _by_system(runs, trained=True)
    pairs = [(OURS, other) for other in trained if not other.startswith(OURS)]
    pairs += [(ours, "dense") for ours in trained if ours.startswith(f"{OURS}-")]
    return [
        found
        for metric, key in METRICS.items()
        for ours, other in pairs
        if ours in trained and other in trained
        if (found := _difference(trained[ours], trained[other], metric, key)) is not None
    ]


def _by_system(runs: Sequence[Runs], *, trained: bool) -> dict[str, Runs]:
    return {
        each.cell.settings["system"]: each
        for each in runs
        if each.cell.settings.get("trained") is trained  # what was only prepared has no such setting
    }


def _difference(ours: Runs, other: Runs, metric: str, key: str) -> Difference | None:
    pairs = [
        (mine[key], theirs[key])
        for mine, theirs in zip(ours.rounds, other.rounds, strict=True)
        if mine and theirs
    ]
    if not pairs:
        return None
    apart = [[a - b for a, b in zip(mine, theirs, strict=True)] for mine, theirs in pairs]
    by_seed = [statistics.fmean(seed) for seed in apart]
    by_example = [statistics.fmean(example) for example in zip(*apart, strict=True)]
    systems = (ours.cell.settings["system"], other.cell.settings["system"])
    return Difference(
        metric, *systems, statistics.fmean(by_seed), stderr(by_seed), stderr(by_example), len(by_seed)
    )


def stderr(values: Sequence[float]) -> float:
    """Return the standard error of the mean; nan for a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def render(results: Mapping[str, Any]) -> str:
    """Render the whole report in Markdown."""
    runs = from_results(results["cells"])
    found = differences(runs)
    rows = [_row(each) for each in runs if each.values("accuracy")]
    parts = [
        table(["system", "seeds", "accuracy, %", "eval loss, nats", "tokens trained on", "held out"], rows),
        _difference_table(found) if found else "",
        "\n".join(f"- {_sentence(each)}" for each in found),
        _learned(runs),
        "\n".join(f"- not run: {each.cell.name}: {each.not_run}" for each in runs if each.not_run),
    ]
    return "\n\n".join(part for part in parts if part)


def _row(each: Runs) -> list[str]:
    tokens = each.values("trained_tokens")
    held_out = len(next(figures for figures in each.rounds if figures)["correct"])
    return [
        f"{each.cell.name} ({each.cell.settings['setting']})",
        str(len(tokens)),
        _mean(each.values("accuracy"), 100, 1),
        _mean(each.values("eval_loss"), 1, 3),
        f"{max(tokens):.0f}",
        str(held_out),
    ]


def _mean(values: Sequence[float], scale: float, digits: int) -> str:
    mean = f"{scale * statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {scale * stderr(values):.{digits}f}"


def _difference_table(found: Sequence[Difference]) -> str:
    rows = [
        [
            f"{each.metric}, {each.ours} less {each.against}",
            f"{each.mean:+.4f}",
            f"{each.seed_stderr:.4f}",
            f"{each.example_stderr:.4f}",
        ]
        for each in found
    ]
    return table(["paired difference", "mean", "SE over seeds", "SE over examples"], rows)


def _sentence(each: Difference) -> str:
    if each.exceeds:
        better = (each.mean > 0) == (each.metric == "accuracy")
        word = "better" if better else "worse"
        only = "" if len(each.exceeds) == 2 else f" over {each.exceeds[0]} only"
        by = f"by {abs(each.mean):.2g}, beyond noise{only}"
        return f"{each.metric}: {each.ours} is {word} than {each.against} {by}"
    unseen = NORMAL * each.example_stderr
    return (
        f"{each.metric}: no difference beyond noise between {each.ours} and {each.against}"
        f" (one of {unseen:.2g} or less would not show here)"
    )


def _learned(runs: Sequence[Runs]) -> str:
    """Say what training changed: systems that learn nothing are equal too."""
    lines = []
    trained = _by_system(runs, trained=True)
    for system, before in _by_system(runs, trained=False).items():
        after = trained[system]
        if before.values("accuracy") and after.values("accuracy"):
            gain = statistics.fmean(after.values("accuracy")) - before.values("accuracy")[0]
            fall = before.values("eval_loss")[0] - statistics.fmean(after.values("eval_loss"))
            lines.append(
                f"- training {system}: accuracy {100 * gain:+.1f} points, eval loss {-fall:+.3f} nats"
            )
    return "\n".join(lines)


def summary(runs: Sequence[Runs]) -> dict[str, Any]:
    """Return the differences as JSON, for the results."""
    return {"differences": [{**asdict(each), "stands_out": bool(each.exceeds)} for each in differences(runs)]}

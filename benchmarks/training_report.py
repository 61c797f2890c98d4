"""Renders the results of the suite `training`: a table a dtype, and in words where modq loses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.runner import Runs, Spread, from_results, ratio
from benchmarks.tables import shown, table
from benchmarks.training import RANDOM_IDS

OURS = "modq"
MB = 1e-6


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure that systems are compared by."""

    key: str
    words: str
    job: str
    higher_is_better: bool = False


METRICS = (
    Metric("tokens_per_second", "training speed", "train", higher_is_better=True),
    Metric("peak_bytes", "peak memory of training", "train"),
    Metric("load_seconds", "time to load its checkpoint", "train"),
    Metric("quantize_seconds", "time to quantize while loading", "quantize"),
    Metric("quantize_peak_bytes", "peak memory of quantizing while loading", "quantize"),
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """modq beside another system under the same settings."""

    metric: str
    settings: str
    against: str
    ratio: Spread  # modq / the other, round by round
    verdict: str  # "behind", "ahead" or "not told apart"


def compare(runs: Sequence[Runs]) -> Iterator[Comparison]:
    """Compare modq with every other system that ran under the same settings, by every metric."""
    for metric in METRICS:
        for ours in (each for each in runs if _is(each, OURS, metric.job)):
            for other in (each for each in runs if _comparable(ours, each)):
                found = ratio(ours, other, metric.key) if _have(metric.key, ours, other) else None
                if found is not None:
                    system = other.cell.settings["system"]
                    yield Comparison(metric.words, _settings(ours), system, found, _verdict(found, metric))


def _is(runs: Runs, system: str, job: str) -> bool:
    return (runs.cell.settings["system"], runs.cell.settings["job"]) == (system, job)


def _comparable(ours: Runs, other: Runs) -> bool:
    same = ("job", "dtype", "checkpointing")
    return other is not ours and all(ours.cell.settings[key] == other.cell.settings[key] for key in same)


def _have(key: str, *runs: Runs) -> bool:
    return all(each.values(key) for each in runs)


def _settings(runs: Runs) -> str:
    checkpointing = ", gradient checkpointing" if runs.cell.settings["checkpointing"] else ""
    return f"{runs.cell.settings['dtype']}{checkpointing}"


def _verdict(found: Spread, metric: Metric) -> str:
    """Only what every round agrees on counts."""
    if found.low <= 1 <= found.high:
        return "not told apart"
    return "ahead" if (found.low > 1) == metric.higher_is_better else "behind"


def render(results: Mapping[str, Any]) -> str:
    """Render the whole report in Markdown."""
    runs = from_results(results["cells"])
    parts = [_text(runs)]
    parts += [_table(runs, dtype) for dtype in dict.fromkeys(each.cell.settings["dtype"] for each in runs)]
    parts += [_quantize_table(runs), _verdicts(list(compare(runs))), _losses(runs), _not_run(runs)]
    return "\n\n".join(part for part in parts if part)


def _text(runs: Sequence[Runs]) -> str:
    """Say so where the losses mean nothing."""
    if any(each.cell.settings.get("text") == RANDOM_IDS for each in runs):
        return (
            "The model has no tokenizer: it trains on random ids from a fixed seed. Its losses mean nothing."
        )
    return ""


def _table(runs: Sequence[Runs], dtype: str) -> str:
    trained = [
        each for each in runs if each.cell.settings["dtype"] == dtype and each.cell.settings["job"] == "train"
    ]
    if not trained:
        return ""
    headings = [
        f"{dtype}, {_step(trained[0].cell.settings)} tokens a step",
        "tokens/s",
        "of dense",
        "peak MB in training",
        "above the model, MB",
        "kept for backward, MB",
        "load, s",
        "on disk, MB",
        "first loss",
    ]
    return table(headings, [_row(each, runs) for each in trained if each.values("losses")])


def _step(settings: Mapping[str, Any]) -> str:
    """Say how many tokens a step has; results of a time before there were batches do not tell the batch."""
    batch = settings.get("batch", 1)
    return f"{settings['tokens']}" if batch == 1 else f"{batch} x {settings['tokens']}"


def _row(each: Runs, runs: Sequence[Runs]) -> list[str]:
    settings = each.cell.settings
    dense = next(
        (
            other
            for other in runs
            if _comparable_or_same(each, other) and other.cell.settings["system"] == "dense"
        ),
        None,
    )
    of_dense = ratio(each, dense, "tokens_per_second") if dense is not None else None
    above = [
        peak - before
        for peak, before in zip(each.values("peak_bytes"), each.values("before_training_bytes"), strict=True)
    ]
    checkpointing = ", checkpointing" if settings["checkpointing"] else ""
    return [
        f"{settings['system']} ({settings['setting']}){checkpointing}",
        shown(Spread.of(each.values("tokens_per_second")), 1),
        shown(of_dense),
        shown(Spread.of(each.values("peak_bytes")), 0, MB),
        shown(Spread.of(above), 0, MB),
        shown(Spread.of(each.values("saved_for_backward_bytes")), 0, MB),
        shown(Spread.of(each.values("load_seconds"))),
        shown(_prepared(each, runs), 0, MB),
        f"{first_loss(each):.5f}",
    ]


def _comparable_or_same(each: Runs, other: Runs) -> bool:
    return other is each or _comparable(each, other)


def _prepared(each: Runs, runs: Sequence[Runs]) -> Spread | None:
    """The size of the checkpoint that a cell loaded."""
    for other in runs:
        if (
            _is(other, each.cell.settings["system"], "prepare")
            and other.cell.settings["dtype"] == each.cell.settings["dtype"]
        ):
            return Spread.of(other.values("checkpoint_bytes"))
    return None


def _quantize_table(runs: Sequence[Runs]) -> str:
    rows = [
        [
            f"{each.cell.settings['system']} ({each.cell.settings['setting']})",
            shown(Spread.of(each.values("quantize_seconds")), 1),
            shown(Spread.of(each.values("quantize_peak_bytes")), 0, MB),
        ]
        for each in runs
        if each.values("quantize_seconds")
    ]
    return table(["quantize while loading", "s", "peak MB"], rows) if rows else ""


def first_loss(runs: Runs) -> float:
    """Return the loss of the first step, before anything was learned: of the base alone."""
    figures = next(figures for figures in runs.rounds if figures)
    return float(figures["losses"][0])


def _losses(runs: Sequence[Runs]) -> str:
    """Say how far apart the two NF4 are: equal bases give equal losses."""
    lines = []
    for ours in (each for each in runs if _is(each, OURS, "train") and each.values("losses")):
        for other in (each for each in runs if _comparable(ours, each) and each.values("losses")):
            if other.cell.settings["system"] == "bitsandbytes":
                apart = first_loss(ours) / first_loss(other) - 1
                lines.append(
                    f"- {_settings(ours)}: modq's first loss is off bitsandbytes' by {apart:+.1e}, relative"
                )
    return "\n".join(["Same base, same loss:", "", *lines]) if lines else ""


def _verdicts(comparisons: Sequence[Comparison]) -> str:
    headings = {
        "behind": "Where modq loses (in every round)",
        "not told apart": "Where the rounds do not tell them apart",
        "ahead": "Where modq is ahead (in every round)",
    }
    parts = []
    for verdict, heading in headings.items():
        lines = [_sentence(each) for each in comparisons if each.verdict == verdict] or ["- nowhere"]
        parts.append("\n".join([f"### {heading}", "", *lines]))
    return "\n\n".join(parts)


def _sentence(each: Comparison) -> str:
    return f"- {each.metric}, {each.settings}: {shown(each.ratio)} times that of {each.against}"


def _not_run(runs: Sequence[Runs]) -> str:
    lines = [f"- {each.cell.name}: {each.not_run}" for each in runs if each.not_run]
    return "\n".join(["### Not run", "", *lines]) if lines else ""


def summary(runs: Sequence[Runs]) -> dict[str, Any]:
    """Return the comparisons as JSON, for the results."""
    return {"comparisons": [asdict(each) for each in compare(runs)]}

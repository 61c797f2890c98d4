"""Renders the results of the suite `kernels`: products beside dense torch and peers, and quantizing."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.kernels import BF16, CACHES, FEW_ROWS, FP32, SYSTEMS
from benchmarks.runner import Runs, Spread, from_results
from benchmarks.tables import shown, table

CLEAN = 0.7
"""A series counts as polluted if less than this part of the busy processor time was its own."""

OF_THE_READ = {"modq-nf4": 0.85, "modq-affine-4": 0.85}
"""What part of the plain read's bytes a second a system must reach at one row."""

FEW_TARGETS: Mapping[str, Mapping[int, float]] = {
    "dense-bf16": {16: 1.4},
    "int4pack": {1: 1.0, 4: 1.0},
    "bitsandbytes-train": {1: 5.0, 4: 5.0},
    "bitsandbytes-eval": {1: 1.0, 4: 1.0},
    "hqq": {1: 20.0, 4: 20.0},
    "gptqmodel": {1: 20.0, 4: 20.0},
    "llama-q4_0": {1: 1.0, 4: 1.0},
    "llama-q2_k": {1: 1.0, 4: 1.0},
    "llama-iq2_xxs": {1: 1.0, 4: 1.0},
}
"""How many times faster than these modq must be, by rows."""

NEAREST = {
    "llama-q4_0": ("modq-nf4", "modq-affine-4"),
    "llama-q2_k": ("modq-affine-2",),
    "llama-iq2_xxs": ("modq-e8p",),
}
"""What a system is compared with, where that is not all of ours."""

MANY_TARGETS = {256: 1.10, 1024: 1.05, 2048: 1.03}
"""The most times that a forward with its backward may take of dense float32's, by rows."""

RIVALS = {
    "modq-nf4": ("bitsandbytes-train", "bitsandbytes-eval"),
    "modq-affine-4": ("int4pack", "hqq", "gptqmodel"),
}
"""Which peers hold a weight in as many bits and in the same manner."""

QUANTIZE_PAIRS = {"modq-nf4": ("bitsandbytes", 2.0), "modq-hqq": ("hqq", 2.0)}
QUANTIZE_SECONDS = {"modq-e8p": 20.0}
QUANTIZE = "quantize-"

Row = dict[str, Any]


class Series:
    """All series of a run of the suite, by system and point."""

    def __init__(self, runs: Sequence[Runs]) -> None:
        self.rounds = {each.cell.name: [_rows(figures) for figures in each.rounds] for each in runs}

    def points(self, system: str) -> list[str]:
        """Return the points that a system was measured at."""
        return list(dict.fromkeys(point for rows in self.rounds.get(system, []) for point in rows))

    def clean(self, system: str, point: str) -> dict[int, Row]:
        """Return a point's series by round: those that are not polluted, or all of them if none is clean."""
        found = {
            number: rows[point] for number, rows in enumerate(self.rounds.get(system, [])) if point in rows
        }
        return {number: row for number, row in found.items() if row["own_share"] >= CLEAN} or found

    def polluted(self, system: str, point: str) -> bool:
        """Tell whether a point has no clean series."""
        return any(row["own_share"] < CLEAN for row in self.clean(system, point).values())

    def spread(self, system: str, point: str, name: str) -> Spread | None:
        """Summarise a figure over the rounds."""
        return Spread.of([row[name] for row in self.clean(system, point).values()])

    def ratio(self, upper: tuple[str, str], lower: tuple[str, str]) -> Spread | None:
        """Divide two (system, point): the ratio of their medians, and the rounds' least and greatest."""
        above, below = self.clean(*upper), self.clean(*lower)
        if not above or not below:
            return None
        whole = _median(above) / _median(below)
        rounds = [above[n]["median"] / below[n]["median"] for n in above.keys() & below.keys()]
        return Spread(whole, min([whole, *rounds]), max([whole, *rounds]))

    def marked(
        self, spread: Spread | None, *used: tuple[str, str], digits: int = 2, scale: float = 1.0
    ) -> str:
        """Show a spread, with a star if one of the points that it is made of has no clean series."""
        star = "*" if spread is not None and any(self.polluted(*each) for each in used) else ""
        return shown(spread, digits, scale) + star


def _rows(figures: Mapping[str, Any] | None) -> dict[str, Row]:
    columns = (figures or {}).get("series", {})
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return {row["point"]: row for row in rows}


def _median(rows: Mapping[int, Row]) -> float:
    return statistics.median(row["median"] for row in rows.values())


def render(results: Mapping[str, Any]) -> str:
    """Render the whole report in Markdown."""
    runs = from_results(results["cells"])
    series = Series(runs)
    shapes = list(dict.fromkeys(point.split()[0] for name in series.rounds for point in series.points(name)))
    parts = [
        "Times are those of single calls; a figure is the median over rounds of their medians, a ratio that "
        "of these medians, with the least and the greatest of the rounds. Calls go around copies of a weight "
        f"that take {CACHES} times the last cache. A star marks what has only polluted series.",
        *_one_row(series, shapes),
        *_few_rows(series, shapes[:1]),
        *_many_rows(series, shapes[:1]),
        *_peers_ahead(series),
        *_quantizing(series),
        *_pollution(series),
        *(f"{each.cell.name}: {each.cell.settings['setting']}." for each in runs),
        *_skipped(runs),
    ]
    return "\n\n".join(parts)


def _verdict(ratio: Spread | None, target: float | None, words: str) -> str:
    """Hold a ratio against the least that it must be; a dash where there is none of them."""
    if ratio is None or target is None:
        return "-"
    return f"{words}: {'met' if ratio.median >= target else 'NOT MET'}"


def _one_row(series: Series, shapes: Sequence[str]) -> Iterator[str]:
    rows = [
        _one_row_of(series, system, shape)
        for shape in shapes
        for system in series.rounds
        if series.clean(system, _one(system, shape))
    ]
    if rows:
        head = ["shape, system", "ms", "least", "times dense-bf16's speed", "target", "GB/s"]
        yield "## One row, bfloat16"
        yield table([*head, "of the plain read, %", "target"], rows)


def _one(system: str, shape: str) -> str:
    plan = SYSTEMS[system].plan
    return (
        f"{shape} 1 read -" if plan == "read" else f"{shape} 1 forward {FP32 if plan == 'dense32' else BF16}"
    )


def _one_row_of(series: Series, system: str, shape: str) -> list[str]:
    here, dense, read = ((name, _one(name, shape)) for name in (system, "dense-bf16", "read"))
    faster = series.ratio(dense, here) if SYSTEMS[system].plan != "read" else None
    nbytes = next(iter(series.clean(*here).values()))["bytes"]
    slower = series.ratio(here, read)
    least = series.spread(*here, "least")
    read_bytes = next((row["bytes"] for row in series.clean(*read).values()), 0)
    share = _inverse(slower, nbytes / read_bytes) if read_bytes else None
    speed = _inverse(series.spread(*here, "median"), nbytes)
    target, of_read = SYSTEMS[system].one_row, OF_THE_READ.get(system)
    return [
        f"{shape} {system}",
        series.marked(series.spread(*here, "median"), here, digits=3, scale=1e3),
        "-" if least is None else f"{least.low * 1e3:.3f}",
        series.marked(faster, here, dense),
        _verdict(faster, target, f"{target}"),
        series.marked(speed, here, digits=1, scale=1e-9),
        series.marked(share, here, read, digits=0, scale=100),
        _verdict(share, of_read, f"{100 * (of_read or 0):.0f} %"),
    ]


def _inverse(divisor: Spread | None, amount: float) -> Spread | None:
    if divisor is None:
        return None
    return Spread(amount / divisor.median, amount / divisor.high, amount / divisor.low)


def _few_rows(series: Series, shapes: Sequence[str]) -> Iterator[str]:
    ours = [name for name in series.rounds if name.startswith("modq-")]
    theirs = [name for name in FEW_TARGETS if series.points(name)]
    for shape in shapes:
        found = [
            _few_rows_of(series, system, theirs, f"{shape} {count} forward {BF16}")
            for count in _counts(series, shape)
            for system in ours
            if count <= FEW_ROWS and series.clean(system, f"{shape} {count} forward {BF16}")
        ]
        if found:
            yield f"## Few rows, {shape}, bfloat16: how many times modq is faster"
            yield table(["rows, system", "ms", *theirs, "NOT MET"], found)
            yield f"Targets: {_few_targets(theirs)}."


def _few_targets(theirs: Sequence[str]) -> str:
    return "; ".join(
        f"{name} {', '.join(f'{target} at {rows}' for rows, target in FEW_TARGETS[name].items())}"
        for name in theirs
    )


def _few_rows_of(series: Series, system: str, theirs: Sequence[str], point: str) -> list[str]:
    count, here = int(point.split()[1]), (system, point)
    ratios = {
        name: series.ratio((name, point), here) if system in NEAREST.get(name, (system,)) else None
        for name in theirs
    }
    missed = [
        name
        for name, ratio in ratios.items()
        if ratio is not None and ratio.median < FEW_TARGETS[name].get(count, 0.0)
    ]
    return [
        f"{count}, {system}",
        series.marked(series.spread(*here, "median"), here, digits=3, scale=1e3),
        *(series.marked(ratio, here, (name, point)) for name, ratio in ratios.items()),
        ", ".join(missed) or "-",
    ]


def _counts(series: Series, shape: str) -> list[int]:
    found = {point for name in series.rounds for point in series.points(name)}
    return sorted({int(point.split()[1]) for point in found if point.split()[0] == shape})


def _many_rows(series: Series, shapes: Sequence[str]) -> Iterator[str]:
    for shape in shapes:
        counts = [count for count in _counts(series, shape) if count > 1]
        rows = [
            [f"{system}, {direction}, {dtype}", *cells]
            for direction in ("both", "dX", "forward")
            for dtype in (FP32, BF16)
            for system in series.rounds
            if system != "dense-fp32"
            and any(cells := _many_rows_of(series, system, shape, direction, dtype, counts))
            and set(cells) != {"-"}
        ]
        if rows:
            yield f"## Times of dense float32's, {shape}"
            yield table(["system, direction, dtype of x", *map(str, counts)], rows)
            targets = ", ".join(f"{target:.2f} at {count}" for count, target in MANY_TARGETS.items())
            yield (
                f"`both` is a forward with its backward, at most {targets} rows. Both dtypes are divided by "
                "dense float32's time, also where x is bfloat16: torch's own product in bfloat16 is a loop "
                "on a CPU without instructions for it, and no yardstick."
            )


def _many_rows_of(
    series: Series, system: str, shape: str, direction: str, dtype: str, counts: Sequence[int]
) -> list[str]:
    cells = []
    for count in counts:
        here = system, f"{shape} {count} {direction} {dtype}"
        dense = "dense-fp32", f"{shape} {count} {direction} {FP32}"
        ratio = series.ratio(here, dense)
        bound = MANY_TARGETS.get(count) if direction == "both" and system.startswith("modq-") else None
        verdict = "" if not ratio or bound is None else " met" if ratio.median <= bound else " NOT MET"
        cells.append(series.marked(ratio, here, dense) + verdict)
    return cells


def _peers_ahead(series: Series) -> Iterator[str]:
    """Say where a peer is faster, of all that both were measured at."""
    compared, ahead = 0, []
    for ours, peers in RIVALS.items():
        for peer in peers:
            for point in series.points(peer):
                ratio = series.ratio((ours, point), (peer, point))
                compared += ratio is not None
                if ratio is not None and ratio.median > 1:
                    ahead.append(f"- {peer} is ahead of {ours} at {point}: {shown(ratio)} times as fast")
    if compared:
        yield "## Peers at any number of rows"
        yield (
            "\n".join(ahead) or f"No peer is ahead of modq's weights of its kind at any of {compared} points."
        )


def _quantizing(series: Series) -> Iterator[str]:
    rows = []
    for name in series.rounds:
        for point in series.points(name) if name.startswith(QUANTIZE) else ():
            rows.append(_quantizing_of(series, name.removeprefix(QUANTIZE), point))
    if rows:
        yield "## Quantizing a float32 weight"
        yield table(["shape, system", "s", "times the peer's speed", "target"], rows)


def _quantizing_of(series: Series, system: str, point: str) -> list[str]:
    here = QUANTIZE + system, point
    seconds, verdict, ratio = series.spread(*here, "median"), "-", None
    used = [here]
    if system in QUANTIZE_PAIRS:
        peer, target = QUANTIZE_PAIRS[system]
        used.append((QUANTIZE + peer, point))
        ratio = series.ratio(used[1], here)
        verdict = _verdict(ratio, target, f"{target}")
    elif system in QUANTIZE_SECONDS and seconds is not None:
        bound = QUANTIZE_SECONDS[system]
        verdict = f"< {bound:.0f} s: {'met' if seconds.median < bound else 'NOT MET'}"
    name = f"{point.split()[0]} {system}"
    return [name, series.marked(seconds, here, digits=3), series.marked(ratio, *used), verdict]


def _pollution(series: Series) -> Iterator[str]:
    rows = [row for rounds in series.rounds.values() for each in rounds for row in each.values()]
    bad = sum(row["own_share"] < CLEAN for row in rows)
    stars = sum(series.polluted(name, point) for name in series.rounds for point in series.points(name))
    yield (
        f"{bad} of {len(rows)} series are polluted: other processes took more than {100 * (1 - CLEAN):.0f} % "
        "of the busy processor time. They are left out where another round is clean; "
        f"{stars} points have no clean series."
    )


def _skipped(runs: Sequence[Runs]) -> Iterator[str]:
    reasons: Counter[tuple[str, str]] = Counter()
    for each in runs:
        figures = next((figures for figures in each.rounds if figures), {})
        reasons.update((each.cell.name, reason) for reason in figures.get("skipped", {}).values())
        if each.not_run:
            yield f"- not run: {each.cell.name}: {each.not_run}"
    for (name, reason), count in reasons.items():
        yield f"- {name}, {count} points not measured: {reason}"


def summary(runs: Sequence[Runs]) -> dict[str, Any]:
    """Say that no real model is in it."""
    return {"model": "Random codes"}

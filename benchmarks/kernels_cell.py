"""Times the products of one system, or how it quantizes: `python -m benchmarks.kernels_cell SETTINGS`."""

from __future__ import annotations

import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import cell
from benchmarks.kernels_systems import MAKE, PACKAGES, QUANTIZE, UnavailableError, Work

WARM_UP_CALLS, WARM_UP_CALLS_OF_MANY_ROWS, MANY_ROWS = 3, 1, 64

SLOW_CALLS = 3
"""The fewest calls of a series, where so many take longer than the most seconds."""

MOST_COPIES = 256
"""Of tiny weights, which are only for trying the suite out."""

BF16_ROWS = {"forward": 256, "dX": 1, "both": 1}
"""Up to how many rows a dense product in bfloat16 takes a bearable time without instructions for it."""


def main(settings: dict[str, Any]) -> dict[str, Any]:
    """Measure every point; return a column for each figure, and why points were skipped."""
    torch.set_num_threads(settings["threads"])
    system = settings["system"]
    measure = _quantizing if settings["plan"] == "quantize" else _products
    columns: dict[str, list[Any]] = defaultdict(list)
    skipped: dict[str, str] = {}
    for point, figures in measure(settings):
        if isinstance(figures, str):
            skipped[point] = figures
            continue
        for name, value in {"point": point, **figures}.items():
            columns[name].append(value)
    return {
        "series": dict(columns),
        "skipped": skipped,
        "cache_bytes": last_cache_bytes(),
        "crossings": _crossings() if system.startswith("modq") else {},
        "versions": cell.versions_of(PACKAGES.get(system.removeprefix("quantize-").partition("-")[0], ())),
    }


def _products(settings: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Yield each point with its figures, or the reason why there are none."""
    made, work = "", None
    for point in settings["points"]:
        shape, rows, direction, dtype = point.split()
        reason = too_slow(settings["plan"], int(rows), direction, dtype)
        if reason is None and made != shape + dtype:
            work = None  # its memory goes before the next one is made
            made, work = shape + dtype, _made(settings, shape, dtype)
        if reason is not None or isinstance(work, str) or work is None:
            yield point, reason or str(work)
        else:
            yield point, _figures(settings, work, point)


def _made(settings: dict[str, Any], shape: str, dtype: str) -> Work | str:
    """Return a weight with its copies, or why there is none."""
    try:
        work = MAKE[settings["system"]](_sizes(shape), getattr(torch, dtype, torch.int64))
    except UnavailableError as error:
        return str(error)
    work.copy(settings["caches"] * last_cache_bytes(), MOST_COPIES)
    return work


def _figures(settings: dict[str, Any], work: Work, point: str) -> dict[str, Any]:
    """Time the calls of a point, going around the copies."""
    shape, rows, direction, dtype = point.split()
    call = _call(work, _sizes(shape), int(rows), direction, getattr(torch, dtype, torch.int64))
    turns = cycle(work.copies)
    warm = WARM_UP_CALLS if int(rows) < MANY_ROWS else WARM_UP_CALLS_OF_MANY_ROWS
    figures = series(lambda: call(next(turns)), warm, settings)
    return {**figures, "bytes": work.nbytes, "copies": len(work.copies)}


def _sizes(words: str) -> tuple[int, int]:
    out_features, in_features = words.split("x")
    return int(out_features), int(in_features)


def too_slow(plan: str, rows: int, direction: str, dtype: str) -> str | None:
    """Say why a product that ends in a dense one of torch is left out, or return None."""
    if (
        plan not in ("dense", "peer")
        or dtype != "bfloat16"
        or fast_bfloat16()
        or rows <= BF16_ROWS[direction]
    ):
        return None
    return "torch multiplies bfloat16 in a loop on this CPU, too slow to time at so many rows"


def fast_bfloat16() -> bool:
    """Tell whether torch has instructions for bfloat16 here."""
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return supported


def _call(
    work: Work, shape: tuple[int, int], rows: int, direction: str, dtype: torch.dtype
) -> Callable[[Any], Any]:
    """Return what multiplies by a copy of the weight."""
    if direction == "read":
        return lambda copy: copy.sum()
    generator = torch.Generator().manual_seed(rows)
    grad, x = (torch.randn(rows, size, generator=generator).to(dtype) for size in shape)
    if direction == "both":
        x.requires_grad_()
        return lambda copy: torch.autograd.grad(work.forward(copy, x), x, grad)
    product, given = (work.forward, x) if direction == "forward" else (work.transposed, grad)

    @torch.no_grad()
    def call(copy: Any) -> Tensor:
        return product(copy, given)

    return call


def _quantizing(settings: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Yield the time that quantizing a float32 weight takes."""
    quantize = QUANTIZE[settings["system"].removeprefix("quantize-")]
    for point in settings["points"]:
        shape = _sizes(point.split()[0])
        generator = torch.Generator().manual_seed(0)
        weight = 0.02 * torch.randn(shape, generator=generator)
        quantize(weight[:256, :256].clone())  # loads what it needs
        few = {**settings, "least_calls": 3, "slow_calls": 1}  # one may take many seconds
        figures = series(lambda weight=weight: quantize(weight), 0, few)
        yield point, {**figures, "bytes": weight.nbytes, "copies": 1}


def series(call: Callable[[], Any], warm: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Time single calls; say how much of the processor this process had meanwhile."""
    for _ in range(warm):
        call()
    times: list[float] = []
    load, own, busy, begun = os.getloadavg()[0], time.process_time(), _busy(), time.perf_counter()
    while goes_on(len(times), time.perf_counter() - begun, settings):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    wall, own, busy = time.perf_counter() - begun, time.process_time() - own, _busy() - busy
    quartiles = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return {
        "median": quartiles[1],
        "least": min(times),
        "lower": quartiles[0],
        "upper": quartiles[2],
        "calls": len(times),
        "load": round(load, 2),
        "cpu_share": round(own / wall / settings["threads"], 3),
        "own_share": round(min(1.0, own / max(own, busy)), 3),
    }


def goes_on(calls: int, seconds: float, settings: dict[str, Any]) -> bool:
    """Tell whether a series needs another call."""
    if seconds >= settings["most_seconds"]:
        return calls < settings.get("slow_calls", SLOW_CALLS)
    return calls < settings["least_calls"] or seconds < settings["least_seconds"]


def _busy() -> float:
    """Return the seconds that all processors together were busy so far, or taken from this machine."""
    first = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0]
    user, nice, system, _, _, interrupts, soft, stolen = map(int, first.split()[1:9])
    return (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")


def last_cache_bytes() -> int:
    """Return the size of the processor's last cache."""
    found = []
    for folder in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        size = (folder / "size").read_text(encoding="ascii").strip()
        scale = {"K": 1 << 10, "M": 1 << 20}.get(size[-1], 1)
        found.append(int(size.rstrip("KM")) * scale)
    return max(found, default=32 << 20)  # machines without that folder: as much as a large one has


def _crossings() -> dict[str, int]:
    from modq.kernels.crossing import measured  # late: a peer's process does not need modq

    return measured()


if __name__ == "__main__":
    cell.run(main)

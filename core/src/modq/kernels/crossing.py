"""Up to how many rows of x a kernel's fused product beats decoding blocks for torch's GEMM.

It depends on the machine, on its instruction set, on the layout and on the dtype, so it is measured: once, at
the first product with a number of rows where either may be faster, on the weight at hand, in about a second.
What was found is kept in a file, so that later runs decide alike and results are equal from run to run; `modq
doctor` shows it. MODQ_FUSED_ROWS=N overrides it, and then nothing is measured.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from modq.errors import OptionError
from modq.folders import write_json

logger = logging.getLogger(__name__)

SWITCH = "MODQ_FUSED_ROWS"

STEPS = (8, 16, 32, 64, 128)
"""The numbers of rows that are tried."""

SURELY_FUSED, SURELY_BLOCKS = 4, 256
"""Rows of x for which no machine needs to be asked."""

_TRIES = 5


def without_measuring(rows: int) -> int | None:
    """Return up to how many rows the fused product is used, if for this many there is no doubt."""
    given = os.environ.get(SWITCH)
    if given is not None:
        return _number(given)
    return None if SURELY_FUSED < rows < SURELY_BLOCKS else SURELY_FUSED


def fused_rows(key: str, seconds: Callable[[int, bool], float]) -> int:
    """Return up to how many rows the fused product is the faster one, measuring it the first time.

    Args:
        key: what was measured: the kernel, the layout's kind, the dtype and the direction.
        seconds: (rows, fused) -> the time of one such product.
    """
    known = _known(_machine())
    if key not in known:
        known[key] = _keep(key, _measure(seconds))
    return known[key]


def measured() -> dict[str, int]:
    """Return what was measured on this machine, by key."""
    return dict(sorted(_read().get(_machine(), {}).items()))


def crossings_file() -> Path:
    """Return where measured crossings are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modq" / "crossings.json"


def _number(given: str) -> int:
    if not given.isdigit():
        raise OptionError(f"{SWITCH}={given!r}, expected a number of rows from 0 on; set one, or unset it")
    return int(given)


def _measure(seconds: Callable[[int, bool], float]) -> int:
    best = SURELY_FUSED
    for rows in STEPS:
        tries = [(seconds(rows, True), seconds(rows, False)) for _ in range(_TRIES)]
        fused, blocks = map(min, zip(*tries, strict=True))  # the least: others may be at work on the machine
        if fused > blocks:
            break
        best = rows
    return best


def timed(work: Callable[[], Any]) -> float:
    """Return the seconds that `work` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _machine() -> str:
    """Name what crossings depend on beside the key."""
    return f"{_processor()}, torch {torch.__version__}, {torch.get_num_threads()} threads"


@lru_cache(maxsize=1)
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return name or platform.processor() or platform.machine()


@lru_cache(maxsize=8)
def _known(machine: str) -> dict[str, int]:
    return dict(_read().get(machine, {}))


def _read() -> dict[str, dict[str, int]]:
    """Read the file; without one, or if it is something else, all is measured anew."""
    try:
        content = json.loads(crossings_file().read_text(encoding="utf-8"))
        return {
            str(machine): {str(key): int(rows) for key, rows in keys.items()}
            for machine, keys in content.items()
        }
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _keep(key: str, rows: int) -> int:
    """Keep what was measured, and return it, or what another process has kept before."""
    everything = _read()
    here = everything.setdefault(_machine(), {})
    kept = here.setdefault(key, rows)
    try:
        crossings_file().parent.mkdir(parents=True, exist_ok=True)
        write_json(crossings_file(), everything)
    except OSError as error:
        logger.warning("crossing of %s not kept, it is measured in each process: %s", key, error)
    return kept

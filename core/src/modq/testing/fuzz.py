"""Random cases through a library of compiled kernels until the time is up; best one built with sanitizers.

A script hands `run` a check. Each tensor of a case should have memory of its own: then a read or a write
beyond it stops a run under AddressSanitizer.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from modq.kernels.library import isa, isas, load_library, use_isa

Choice = TypeVar("Choice")


class Draw:
    """Random choices from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def number(self, low: int, high: int) -> int:
        """From low to high, small ones more often."""
        share = torch.rand((), generator=self.generator).item() ** 2
        return low + round(share * (high - low))

    def one_of(self, *choices: Choice) -> Choice:
        """Any of these."""
        return choices[int(torch.randint(len(choices), (), generator=self.generator))]

    def uniform(self, *shape: int) -> Tensor:
        """Float32 from 0 to 1."""
        return torch.rand(shape, generator=self.generator)

    def codes(self, bits: int, *shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        """Integers below 2^bits."""
        return torch.randint(0, 2**bits, shape, generator=self.generator, dtype=dtype)

    def strided(self, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A matrix whose rows lie apart and begin anywhere, from -1/2 to 1/2."""
        skip = self.one_of(0, 0, self.number(0, 9))
        wide = self.uniform(rows, columns + skip + self.one_of(0, self.number(0, 9))) - 0.5
        return wide.to(dtype)[:, skip : skip + columns]


def run(check: Callable[[Draw, int], None], library: Path, use: Callable[[ctypes.CDLL], None]) -> None:
    """Run the command line of a fuzz script: `--library`, `--seconds`, `--seed`.

    Args:
        check: (random choices, number of the case), raises an AssertionError that says what differs. It is
            called under each instruction set that this machine runs, in turn.
        library: the default of `--library`.
        use: makes the kernels call an opened library.

    Raises:
        SystemExit: with one line that names the seed, if a check fails.
    """
    parser = argparse.ArgumentParser(description="Random cases through compiled kernels.")
    parser.add_argument("--library", type=Path, default=library)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    opened = load_library(given.library)
    use(opened)
    torch.set_num_threads(2)
    count, stop, names = 0, time.monotonic() + given.seconds, isas(opened)
    while time.monotonic() < stop:
        use_isa(opened, names[count % len(names)])
        seed = given.seed + count
        try:
            check(Draw(seed), count // len(names))
        except AssertionError as error:
            raise SystemExit(f"seed {seed} on {isa(opened)} differs: {error}") from None
        count += 1
    print(f"{count} cases on {', '.join(names)} in {given.seconds:.0f} s, nothing found")

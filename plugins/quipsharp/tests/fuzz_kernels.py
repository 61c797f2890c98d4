"""Random E8P codes, shapes, slices and strides through the compiled kernels, against plain torch.

    make fuzz        builds the library with AddressSanitizer and UndefinedBehaviorSanitizer and runs this

Each tensor has memory of its own, so a read or a write beyond it stops the run. Not collected by pytest.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

from modq.kernels import library
from modq_quipsharp import cpu
from modq_quipsharp.codebooks import E8P, Coded


def number(generator: torch.Generator, low: int, high: int) -> int:
    """From low to high, small ones more often."""
    share = torch.rand((), generator=generator).item() ** 2
    return low + round(share * (high - low))


def strided(generator: torch.Generator, rows: int, columns: int) -> Tensor:
    """Rows that lie apart and begin anywhere."""
    skip = number(generator, 0, 9)
    wide = torch.rand(rows, columns + skip + number(generator, 0, 9), generator=generator) - 0.5
    return wide[:, skip : skip + columns]


def check(generator: torch.Generator, bits: int) -> None:
    """Compare products, a slice and codes of one random weight with plain torch."""
    columns = 8 * number(generator, 1, 600)
    shape = (number(generator, 1, min(5000, max(1, 100_000 // columns))), columns)
    codebook, half = E8P(bits, 2.5), bool(number(generator, 0, 1))
    codes = torch.randint(1 << 16, (shape[0], columns // 8, codebook.stages), generator=generator).int()
    if bits == 3:
        codes[..., 1] &= 255
    weight, tensors = Coded(shape, codebook, half), codebook.pack(codes)
    matrix = weight.decode(tensors, torch.float32, slice(0, shape[0]), slice(0, columns))
    part = [slice(*sorted((number(generator, 0, n), number(generator, 0, n)))) for n in shape]
    out = torch.empty(part[0].stop - part[0].start, part[1].stop - part[1].start)
    if out.numel():
        cpu.E8P_KERNEL.dequantize(weight, tensors, out, *part)
    assert torch.equal(out, matrix[part[0], part[1]])
    for transpose in (False, True):
        x = strided(generator, number(generator, 1, 40), shape[0 if transpose else 1])
        exact = x.double() @ (matrix.double() if transpose else matrix.double().T)
        y, again = strided(generator, *exact.shape), strided(generator, *exact.shape)
        for each in (y, again):
            cpu.E8P_KERNEL.product(weight, x, tensors, each, transpose)
        scale = x.double().norm(dim=1, keepdim=True) * matrix.double().norm()
        assert ((y - exact).abs() <= (2e-4 if half else 2e-6) * scale).all()
        assert torch.equal(y, again)
    x = 3 * torch.randn(number(generator, 1, 300), 8, generator=generator)
    found = cpu.nearest(codebook, x)
    assert found is not None
    assert found[1].min() >= 0
    assert found[1].max() < 1 << 16


def main() -> None:
    """Fuzz for as long as asked, and say how much that was."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, default=cpu.LIBRARY)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    opened = library.load_library(given.library)
    cpu.library = lambda: opened
    torch.set_num_threads(2)
    count, stop = 0, time.monotonic() + given.seconds
    names = library.isas(opened)
    while time.monotonic() < stop:
        library.use_isa(opened, names[count % len(names)])
        try:
            check(torch.Generator().manual_seed(given.seed + count), 2 + count // 2 % 3)
        except AssertionError:
            raise SystemExit(f"seed {given.seed + count} on {library.isa(opened)} differs") from None
        count += 1
    print(f"{count} weights on {', '.join(names)} in {given.seconds:.0f} s, nothing found")


if __name__ == "__main__":
    main()

"""Random weights, shapes, strides and dtypes through the compiled kernels, against the plain-torch layouts.

    make fuzz        builds the library with AddressSanitizer and UndefinedBehaviorSanitizer and runs this

Each tensor has memory of its own, so a read or a write beyond it stops the run. Not collected by pytest.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
from torch import Tensor

from modq.kernels import crossing, dispatch, library
from modq.layouts import Affine, Codebook, NestedScales, VectorCodebook

HALVES_AND_FULL = (torch.float32, torch.bfloat16, torch.float16)


class Draw:
    """Random choices from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def number(self, low: int, high: int) -> int:
        """From low to high, small ones more often."""
        share = torch.rand((), generator=self.generator).item() ** 2
        return low + round(share * (high - low))

    def one_of(self, *choices):
        return choices[int(torch.randint(len(choices), (), generator=self.generator))]

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def codes(self, bits: int, *shape: int) -> Tensor:
        return torch.randint(0, 2**bits, shape, generator=self.generator, dtype=torch.uint8)


def draw_affine(draw: Draw) -> tuple[Affine, dict[str, Tensor]]:
    bits = draw.one_of(1, 2, 3, 4, 8)
    group = draw.one_of(16, 32, 64, 128, 256, 1024, draw.number(1, 300))
    zeros = draw.one_of("symmetric", "integer", "float")
    dtype = draw.one_of(*HALVES_AND_FULL)
    columns = draw.number(1, 5000)
    shape = (draw.number(1, min(5000, max(1, 200000 // columns))), columns)
    layout = Affine(shape, bits, group, zeros, dtype, permuted=draw.one_of(False, False, True))
    grid = (shape[0], layout.groups)
    scales = (draw.uniform(*grid) - 0.3).to(dtype)
    given = {"symmetric": None, "integer": draw.codes(bits, *grid)}
    zero = given[zeros] if zeros in given else (draw.uniform(*grid) * 2**bits).to(dtype)
    position = torch.randperm(columns, generator=draw.generator).int() if layout.permuted else None
    return layout, layout.pack(draw.codes(bits, *shape), scales, zero, position)


def draw_codebook(draw: Draw) -> tuple[Codebook, dict[str, Tensor]]:
    table = tuple((draw.uniform(2 ** draw.one_of(1, 2, 3, 4, 4, 4, 8)) * 2 - 1).tolist())
    columns = draw.number(1, 5000)
    shape = (draw.number(1, min(5000, max(1, 200000 // columns))), columns)
    nested = NestedScales(
        tuple((draw.uniform(256) * 2 - 1).tolist()), draw.one_of(8, 256, draw.number(1, 300))
    )
    block = draw.one_of(32, 64, 128, 256, draw.number(1, 300))
    layout = Codebook(shape, table, block, draw.one_of(None, nested))
    return layout, layout.encode(draw.uniform(*shape) - 0.5)


def draw_vector(draw: Draw) -> tuple[VectorCodebook, dict[str, Tensor]]:
    size = draw.one_of(8, 8, 8, 16, 32)
    bits = draw.one_of(8, 16, draw.number(1, 16))
    books = draw.one_of(1, 2, draw.number(1, 8))
    columns = size * draw.number(1, 5000 // size)
    shape = (draw.number(1, min(5000, max(1, 200000 // columns))), columns)
    dtype = draw.one_of(*HALVES_AND_FULL)
    layout = VectorCodebook(shape, books, bits, dtype, size)
    runs = (shape[0], columns // size, books)
    codes = torch.randint(0, 2**bits, runs, generator=draw.generator, dtype=torch.int32)
    points = (draw.uniform(books, 2**bits, size) - 0.4).to(dtype)
    return layout, layout.pack(codes, points, (draw.uniform(shape[0]) - 0.3).to(dtype))


def strided(draw: Draw, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Rows that lie apart and begin anywhere."""
    skip = draw.one_of(0, 0, draw.number(0, 9))
    wide = draw.uniform(rows, columns + skip + draw.one_of(0, draw.number(0, 9))) - 0.5
    return wide.to(dtype)[:, skip : skip + columns]


def check(layout: Affine | Codebook | VectorCodebook, tensors: dict[str, Tensor], draw: Draw) -> None:
    whole = (slice(0, layout.shape[0]), slice(0, layout.shape[1]))
    os.environ[dispatch.SWITCH] = "reference"
    matrix = layout.dequantize(tensors, torch.float32, *whole)
    os.environ[dispatch.SWITCH] = ""
    dtype = draw.one_of(*HALVES_AND_FULL)
    rows, columns = (sorted((draw.number(0, n), draw.number(0, n))) for n in layout.shape)
    found = layout.dequantize(tensors, dtype, slice(*rows), slice(*columns))
    assert torch.equal(found, matrix[slice(*rows), slice(*columns)].to(dtype))
    os.environ[crossing.SWITCH] = draw.one_of("0", "100")
    for transpose in (False, True):
        x = strided(draw, draw.number(1, 40), layout.shape[0 if transpose else 1], dtype)
        y = layout.matmul(x, tensors, transpose)
        exact = x.double() @ (matrix.double() if transpose else matrix.double().T)
        scale = x.double().norm(dim=1, keepdim=True) * matrix.double().norm()
        assert ((y.double() - exact).abs() <= 4 * torch.finfo(dtype).eps * scale).all()
        assert torch.equal(y, layout.matmul(x, tensors, transpose))


def main() -> None:
    """Fuzz for as long as asked, and say how much that was."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, default=library.CORE)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    library.CORE = given.library
    opened = library.load_library(given.library)
    library.library = lambda: opened
    from modq.kernels import cpu  # late: it takes `library` by name

    cpu.library = lambda: opened
    torch.set_num_threads(2)
    count, stop = 0, time.monotonic() + given.seconds
    names = library.isas(opened)
    while time.monotonic() < stop:
        draw = Draw(given.seed + count)
        library.use_isa(opened, names[count % len(names)])
        draw_one = (draw_affine, draw_codebook, draw_affine, draw_vector)[count // 2 % 4]
        layout, tensors = draw_one(draw)
        try:
            check(layout, tensors, draw)
        except AssertionError:
            raise SystemExit(
                f"seed {given.seed + count}: {layout} on {library.isa(opened)} differs"
            ) from None
        count += 1
    print(f"{count} weights on {', '.join(names)} in {given.seconds:.0f} s, nothing found")


if __name__ == "__main__":
    main()

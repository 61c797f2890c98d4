"""Random weights, shapes, strides and dtypes through the compiled kernels, against the plain-torch layouts.

    make fuzz        builds the library with AddressSanitizer and UndefinedBehaviorSanitizer and runs this

Each tensor has memory of its own, so a read or a write beyond it stops the run. Not collected by pytest.
"""

from __future__ import annotations

import ctypes
import os

import torch
from torch import Tensor

from modq.kernels import crossing, dispatch, library
from modq.layouts import Affine, Codebook, NestedScales, VectorCodebook
from modq.testing.fuzz import Draw, run

HALVES_AND_FULL = (torch.float32, torch.bfloat16, torch.float16)


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
    codes = draw.codes(bits, *runs, dtype=torch.int32)
    points = (draw.uniform(books, 2**bits, size) - 0.4).to(dtype)
    return layout, layout.pack(codes, points, (draw.uniform(shape[0]) - 0.3).to(dtype))


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
        x = draw.strided(draw.number(1, 40), layout.shape[0 if transpose else 1], dtype)
        y = layout.matmul(x, tensors, transpose)
        exact = x.double() @ (matrix.double() if transpose else matrix.double().T)
        scale = x.double().norm(dim=1, keepdim=True) * matrix.double().norm()
        assert ((y.double() - exact).abs() <= 4 * torch.finfo(dtype).eps * scale).all()
        assert torch.equal(y, layout.matmul(x, tensors, transpose))


def check_one(draw: Draw, number: int) -> None:
    layout, tensors = (draw_affine, draw_codebook, draw_affine, draw_vector)[number % 4](draw)
    try:
        check(layout, tensors, draw)
    except AssertionError:
        raise AssertionError(layout) from None


def use(opened: ctypes.CDLL) -> None:
    """Let core's kernels call this library."""
    library.library = lambda: opened
    from modq.kernels import cpu  # late: it takes `library` by name

    cpu.library = lambda: opened


if __name__ == "__main__":
    run(check_one, library.CORE, use)

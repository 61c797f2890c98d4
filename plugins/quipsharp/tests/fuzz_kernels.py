"""Random E8P codes, shapes, slices and strides through the compiled kernels, against plain torch.

    make fuzz        builds the library with AddressSanitizer and UndefinedBehaviorSanitizer and runs this

Each tensor has memory of its own, so a read or a write beyond it stops the run. Not collected by pytest.
"""

from __future__ import annotations

import ctypes

import torch

from modq.testing.fuzz import Draw, run
from modq_quipsharp import cpu
from modq_quipsharp.codebooks import E8P, Coded
from modq_quipsharp.rotation import Rotation
from modq_quipsharp.turn import Turn


def check(draw: Draw, number: int) -> None:
    """Compare products, a slice and codes of one random weight with plain torch."""
    bits, half = 2 + number % 3, draw.one_of(False, True)
    columns = 8 * draw.number(1, 600)
    shape = (draw.number(1, min(5000, max(1, 100_000 // columns))), columns)
    codebook = E8P(bits, 2.5)
    codes = draw.codes(16, shape[0], columns // 8, codebook.stages, dtype=torch.int32)
    if bits == 3:
        codes[..., 1] &= 255
    weight, tensors = Coded(shape, codebook, half), codebook.pack(codes)
    matrix = weight.decode(tensors, torch.float32, slice(0, shape[0]), slice(0, columns))
    part = [slice(*sorted((draw.number(0, n), draw.number(0, n)))) for n in shape]
    out = torch.empty(part[0].stop - part[0].start, part[1].stop - part[1].start)
    if out.numel():
        cpu.E8P_KERNEL.dequantize(weight, tensors, out, *part)
    assert torch.equal(out, matrix[part[0], part[1]]), f"{part} of {weight}"
    for transpose in (False, True):
        x = draw.strided(draw.number(1, 40), shape[0 if transpose else 1])
        exact = x.double() @ (matrix.double() if transpose else matrix.double().T)
        y, again = draw.strided(*exact.shape), draw.strided(*exact.shape)
        for each in (y, again):
            cpu.E8P_KERNEL.product(weight, x, tensors, each, transpose)
        scale = x.double().norm(dim=1, keepdim=True) * matrix.double().norm()
        assert ((y - exact).abs() <= (2e-4 if half else 2e-6) * scale).all(), f"{weight}, {transpose=}"
        assert torch.equal(y, again), f"{weight}, {transpose=}, from call to call"
    check_side(draw)
    found = cpu.nearest(codebook, 6 * (draw.uniform(draw.number(1, 300), 8) - 0.5))
    assert found is not None
    assert found[1].min() >= 0
    assert found[1].max() < 1 << 16


def check_side(draw: Draw) -> None:
    """Compare what is done to vectors before or after the codes with plain torch in float64."""
    size = draw.one_of(1, 3, 11, 12, 28, 43, 172) * 2 ** draw.number(0, 6)
    first = draw.number(0, size - 1)
    count = draw.number(1, size - first)
    scales, factor = draw.uniform(count).half(), draw.one_of(None, draw.uniform(1))
    side = Turn(Rotation(size, "hadamard"), scales, factor, 0.25, slice(first, first + count))
    for transpose in (False, True):
        x = draw.strided(draw.number(1, 20), count if transpose else size)
        y = cpu.turn(side, x, torch.float32, transpose)
        assert y is not None
        exact = side.apply(x.double(), torch.float64, transpose)
        allowed = 1e-5 * x.double().norm(dim=1, keepdim=True) + 1e-12
        assert ((y - exact).abs() <= allowed).all(), f"{side.rotation}, {side.own}, {transpose=}"


def use(opened: ctypes.CDLL) -> None:
    """Let the plugin's kernels call this library."""
    cpu.library = lambda: opened


if __name__ == "__main__":
    run(check, cpu.LIBRARY, use)

"""The compiled kernels of E8P against plain torch, in every instruction set that this machine runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from modq.kernels.dispatch import dequantized, kernel_for
from modq.kernels.library import isas, use_isa
from modq_quipsharp import cpu
from modq_quipsharp.codebooks import E8P, RUNS_AT_ONCE, Coded
from modq_quipsharp.e8 import e8p_points, e81b_points
from modq_quipsharp.layout import Rotated
from modq_quipsharp.rotation import Rotation
from modq_quipsharp.turn import Turn

opened = cpu.library()
pytestmark = pytest.mark.skipif(opened is None, reason=f"not built: {cpu.E8P_KERNEL.why_missing()}")

ISAS = isas(opened) if opened else []
CODEBOOKS = [E8P(2, 1.0), E8P(3, 2.04), E8P(4, 3.45)]
SHAPES = [(37, 8), (17, 24), (63, 264), (5, 1032)]
every_codebook = pytest.mark.parametrize("codebook", CODEBOOKS, ids=lambda its: f"{its.bits}bits")
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(params=[ISAS[0], ISAS[-1]] if ISAS else [None])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instruction set in use: portable, or the best one."""
    assert opened is not None
    use_isa(opened, request.param)
    yield request.param
    use_isa(opened, None)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def coded(codebook: E8P, shape: tuple[int, int], half: bool = False) -> tuple[Coded, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(shape[0])
    runs = (shape[0], shape[1] // 8, codebook.stages)
    codes = torch.randint(0, 1 << 16, runs, generator=generator, dtype=torch.int32)
    if codebook.bits == 3:
        codes[..., 1] &= 255
    return Coded(shape, codebook, half), codebook.pack(codes)


def everything(weight: Coded) -> tuple[slice, slice]:
    return slice(0, weight.shape[0]), slice(0, weight.shape[1])


def test_two_small_tables_stand_for_all_points() -> None:
    rows, signs, fine = cpu.tables()
    assert torch.equal((rows[:, None] ^ signs).view(-1, 8), e8p_points().short())
    assert torch.equal(fine, e81b_points().short())


@every_codebook
@every_shape
def test_decoding_is_bit_equal_to_the_reference(codebook: E8P, shape: tuple[int, int], isa: str) -> None:
    weight, tensors = coded(codebook, shape)
    for columns in (slice(0, shape[1]), slice(3, shape[1] - 2), slice(1, 4)):
        rows = slice(shape[0] // 3, shape[0])
        found = dequantized(weight, tensors, torch.float32, rows, columns)
        assert torch.equal(found, weight.decode(tensors, torch.float32, rows, columns))


@every_codebook
@every_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_products_are_as_close_as_the_dense_product(
    codebook: E8P, shape: tuple[int, int], dtype: torch.dtype, isa: str
) -> None:
    weight, tensors = coded(codebook, shape, half=dtype != torch.float32)
    dense = weight.decode(tensors, torch.float64, *everything(weight))
    for transpose in (False, True):
        matrix = dense if transpose else dense.T
        for rows in (1, 3, 17):
            x = gaussian(rows, matrix.shape[0], seed=rows)
            exact = x.double() @ matrix
            found = torch.empty(rows, matrix.shape[1])
            cpu.E8P_KERNEL.product(weight, x, tensors, found, transpose)
            allowed = (x.to(dtype) @ matrix.to(dtype) - exact).norm()
            error = (found - exact).norm()
            assert error <= 2 * allowed, f"{rows} rows, transpose={transpose}: {error}"


@pytest.mark.parametrize("shape", [(40, 48), (56, 24)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rotated_products_are_as_close_with_the_kernel_as_without(
    shape: tuple[int, int], dtype: torch.dtype, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Rotated(shape, 2, "e8p", 1.0, "hadamard", 0, ())
    tensors = coded(E8P(2, 1.0), shape)[1]
    tensors["input_scales"], tensors["output_scales"] = (
        gaussian(shape[1]).sign().half(),
        gaussian(shape[0]).half(),
    )
    tensors["scale"] = torch.full((1,), 0.37)
    x = gaussian(3, shape[1]).to(dtype)
    monkeypatch.setenv("MODQ_FUSED_ROWS", "32")
    found = layout.matmul(x, tensors, transpose=False)
    monkeypatch.setenv("MODQ_KERNELS", "reference")
    assert found.dtype == dtype
    assert kernel_for(Coded(shape, E8P(2, 1.0)), {"codes": tensors["codes"]}, torch.float32) is None
    exact = layout.matmul(x.double(), tensors, transpose=False)
    without = layout.matmul(x, tensors, transpose=False)
    assert (found - exact).norm() <= 2 * (without - exact).norm()


def one_side(size: int, first: int, count: int) -> Turn:
    scales = gaussian(count, seed=size).half()
    return Turn(Rotation(size, "hadamard"), scales, torch.tensor([0.37]), 0.25, slice(first, first + count))


TURNED = [
    pytest.param(1, 0, 1, id="one number"),
    pytest.param(4, 0, 4, id="shorter than a vector"),
    pytest.param(12, 0, 12, id="a published matrix alone"),
    pytest.param(24, 0, 24, id="lines of two"),
    pytest.param(192, 0, 192, id="lines of a vector"),
    pytest.param(4096, 0, 4096, id="a power of two"),
    pytest.param(344, 0, 344, id="the largest of the list"),
    pytest.param(88, 0, 88, id="lines of the fallback"),
    pytest.param(719, 0, 719, id="the fallback by FFT"),
    pytest.param(96, 30, 41, id="a part of a fused layer"),
]


@pytest.mark.parametrize(("size", "first", "count"), TURNED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_side_is_turned_as_exactly_as_in_plain_torch(
    size: int, first: int, count: int, dtype: torch.dtype, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = one_side(size, first, count)
    for transpose in (False, True):
        x = gaussian(5, 2 * (count if transpose else size)).to(dtype)[:, ::2]
        assert (cpu.turn(side, x, dtype, transpose) is not None) == (size != 719)
        found = side.apply(x, torch.float32, transpose)
        assert torch.equal(side.apply(x, dtype, transpose), found.to(dtype))
        exact = side.apply(x.double(), torch.float64, transpose)
        monkeypatch.setenv("MODQ_KERNELS", "reference")
        expected = side.apply(x, torch.float32, transpose)
        monkeypatch.undo()
        assert (found - exact).norm() <= 2 * (expected - exact).norm() + 1e-7 * exact.norm()


@pytest.mark.parametrize("size", [24, 64, 88])
def test_a_side_turned_both_ways_is_one_matrix_and_its_transpose(size: int, isa: str) -> None:
    side, unit = one_side(size, 3, size - 7), torch.eye(size)
    there = side.apply(unit, torch.float32)
    back = side.apply(torch.eye(size - 7), torch.float32, transpose=True)
    torch.testing.assert_close(there.T, back)


def test_infinite_numbers_stay_so_or_become_nan_and_large_ones_finite(isa: str) -> None:
    side = Turn(Rotation(64, "hadamard"), torch.ones(64).half(), None, 1.0, slice(0, 64))
    x = torch.full((1, 64), 1e37)
    assert side.apply(x, torch.float32).isfinite().all()
    x[0, 3] = torch.inf
    assert not side.apply(x, torch.float32).isfinite().any()


def test_float64_is_left_to_the_reference() -> None:
    weight, tensors = coded(CODEBOOKS[0], (17, 24))
    assert kernel_for(weight, tensors, torch.float32) is cpu.E8P_KERNEL
    assert kernel_for(weight, tensors, torch.float64) is None


@every_codebook
@pytest.mark.parametrize("count", [1, 13, 3000])
def test_the_encoder_finds_points_as_near_as_the_reference(
    codebook: E8P, count: int, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.cat([spread * gaussian(count, 8, seed=3) for spread in (0.3, 1.03, 3.0)])
    found = cpu.nearest(codebook, x)
    assert found is not None
    monkeypatch.setenv("MODQ_KERNELS", "reference")
    assert cpu.nearest(codebook, x) is None
    points, codes = codebook.nearest(x)
    distance, expected = ((its.double() - x).norm(dim=1) for its in (found[0], points))
    assert (
        distance - expected
    ).abs().max() < 1e-5  # codes differ where two points are equally near in float32
    same = (found[1] == codes).all(1)
    assert same.float().mean() > 0.99
    assert torch.equal(found[0][same], points[same])


@every_codebook
def test_codes_are_the_same_in_every_instruction_set(codebook: E8P) -> None:
    assert opened is not None
    x = 1.5 * gaussian(RUNS_AT_ONCE // 8, 8)
    codes = []
    for name in ISAS:
        use_isa(opened, name)
        codes.append(codebook.nearest(x)[1])
    use_isa(opened, None)
    assert all(torch.equal(codes[0], others) for others in codes)


def test_without_a_library_all_is_plain_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    x, codebook = gaussian(100, 8), CODEBOOKS[0]
    with_it = codebook.nearest(x)
    monkeypatch.setattr(cpu, "library", lambda: None)
    monkeypatch.setattr(cpu, "LIBRARY", tmp_path / cpu.LIBRARY.name)
    weight, tensors = coded(codebook, (17, 24))
    assert kernel_for(weight, tensors, torch.float32) is None
    assert "is not there" in str(cpu.E8P_KERNEL.why_missing())
    assert torch.equal(codebook.nearest(x)[1], with_it[1])

"""Compiled kernels against the plain-torch layouts: every instruction set that this machine runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from modq.errors import OptionError
from modq.kernels import cpu, crossing, dispatch
from modq.kernels.library import isas, library, use_isa
from modq.layouts import Affine, Codebook, NestedScales

opened = library()
if opened is None:
    pytest.skip("modq was installed without its compiled library", allow_module_level=True)

TABLE = tuple(float(i) / 15 - 0.4 for i in range(16))
NESTED = NestedScales(tuple(float(i) / 255 - 0.3 for i in range(256)), block_size=8)
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32

LAYOUTS = [
    *(Affine((37, 576), bits, 64, "integer", BRAIN) for bits in (1, 2, 3, 4, 8)),
    *(Affine((5, 1000), bits, 128, "symmetric", HALF) for bits in (2, 3, 4, 8)),
    *(Affine((19, 544), bits, 32, "float", FULL) for bits in (2, 3, 4, 8)),
    *(Affine((33, 97), bits, 7, "float", FULL) for bits in (1, 2, 3, 4, 8)),
    Affine((3, 2048), 4, 2048, "integer", HALF),
    Affine((70, 96), 3, 96, "integer", HALF, permuted=True),
    Affine((1, 1), 4, 32, "symmetric", FULL),
    Codebook((37, 576), TABLE, 64),
    Codebook((18, 256), TABLE, 32, NESTED),
    Codebook((5, 1024), TABLE, 256, NESTED),
    Codebook((33, 97), TABLE, 64, NESTED),  # blocks straddle rows
    Codebook((9, 96), TABLE[:4], 16),
    Codebook((9, 96), NESTED.table, 16),
]


@pytest.fixture(params=isas(opened), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    use_isa(opened, request.param)
    yield request.param
    use_isa(opened, None)


def tensors_of(layout: Affine | Codebook) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    if isinstance(layout, Codebook):
        return layout.encode(torch.randn(layout.shape, generator=generator))
    codes = torch.randint(0, 2**layout.bits, layout.shape, generator=generator, dtype=torch.uint8)
    grid = (layout.shape[0], layout.groups)
    scales = (torch.randn(grid, generator=generator) * 0.05).to(layout.scale_dtype)  # negative ones, too
    zeros = {
        "symmetric": None,
        "integer": torch.randint(0, 2**layout.bits, grid, generator=generator, dtype=torch.uint8),
        "float": (torch.rand(grid, generator=generator) * 2**layout.bits).to(layout.scale_dtype),
    }[layout.zeros]
    position = torch.randperm(layout.shape[1], generator=generator).int() if layout.permuted else None
    return layout.pack(codes, scales, zeros, position)


def decoded(layout: Affine | Codebook, tensors: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The whole matrix by the reference."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(dispatch.SWITCH, "reference")
        whole = (slice(0, layout.shape[0]), slice(0, layout.shape[1]))
        return layout.dequantize(tensors, dtype, *whole)


@pytest.mark.parametrize("dtype", [FULL, BRAIN, HALF], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_slice_is_bit_equal_to_the_reference(layout: Affine | Codebook, dtype: torch.dtype) -> None:
    tensors, (out_features, in_features) = tensors_of(layout), layout.shape
    exact = decoded(layout, tensors, dtype)
    assert dispatch.kernel_for(layout, tensors, dtype) is not None
    for rows in (slice(0, out_features), slice(out_features // 3, out_features - out_features // 4)):
        for columns in (slice(0, in_features), slice(in_features // 3 + 1, in_features), slice(0, 1)):
            assert torch.equal(layout.dequantize(tensors, dtype, rows, columns), exact[rows, columns])


@pytest.mark.parametrize("fused_rows", ["0", "100"])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_product_is_as_close_as_the_dense_one(
    layout: Affine | Codebook, transpose: bool, fused_rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(crossing.SWITCH, fused_rows)
    tensors = tensors_of(layout)
    matrix = decoded(layout, tensors, torch.float64)
    matrix = matrix if transpose else matrix.T
    generator = torch.Generator().manual_seed(1)
    for dtype in (FULL, BRAIN, HALF):
        for rows in (1, 2, 7, 37):
            x = torch.randn(rows, matrix.shape[0], generator=generator).to(dtype)
            exact = x.double() @ matrix
            y = layout.matmul(x, tensors, transpose)
            assert y.dtype == dtype
            # in float32 but for the operands and the result: torch's own loops for halves differ by CPU
            dense = (x.float() @ matrix.to(dtype).float()).to(dtype)
            # a handful of outputs is luck: what each operand's rounding may cost is always allowed
            floor = x.double().norm() * matrix.norm() * torch.finfo(dtype).eps / 8
            allowed = 2 * (dense.double() - exact).norm() + floor
            assert (y.double() - exact).norm() <= allowed, (dtype, rows)


def test_runs_are_bit_equal_and_threads_round_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(crossing.SWITCH, "100")
    layout = Affine((300, 1024), 4, 128, "integer", BRAIN)
    tensors = tensors_of(layout)
    before = torch.get_num_threads()
    try:
        for dtype in (FULL, BRAIN):
            for transpose in (False, True):
                x = torch.ones(3, layout.shape[0 if transpose else 1], dtype=dtype)
                torch.set_num_threads(2)
                two = [layout.matmul(x, tensors, transpose) for _ in range(3)]
                torch.set_num_threads(1)
                one = layout.matmul(x, tensors, transpose)
                assert torch.equal(two[0], two[1])
                assert torch.equal(two[0], two[2])
                torch.testing.assert_close(one, two[0], rtol=torch.finfo(dtype).eps, atol=1e-4)
    finally:
        torch.set_num_threads(before)


def test_strided_and_odd_inputs_give_what_plain_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(crossing.SWITCH, "100")
    layout = Affine((40, 96), 4, 32, "integer", BRAIN)
    tensors = tensors_of(layout)
    base = torch.randn(2, 3, 300, generator=torch.Generator().manual_seed(2)).bfloat16()
    odd = base[..., 5:101]  # rows apart, and not where vectors begin
    assert torch.equal(layout.matmul(odd, tensors, False), layout.matmul(odd.contiguous(), tensors, False))
    mixed = base[:, :, ::3][..., :96]
    assert torch.equal(
        layout.matmul(mixed, tensors, False), layout.matmul(mixed.contiguous(), tensors, False)
    )
    assert layout.matmul(base[0, 0, :96], tensors, False).shape == (40,)
    assert layout.matmul(base[:0, :, :96], tensors, False).shape == (0, 3, 40)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("layout", [LAYOUTS[3], LAYOUTS[21]], ids=str)
def test_what_is_not_finite_in_x_is_seen_in_its_row_only(
    layout: Affine | Codebook, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(crossing.SWITCH, "100")
    x = torch.ones(2, layout.shape[1], dtype=BRAIN)
    x[1, 7] = bad
    y = layout.matmul(x, tensors_of(layout), False)
    assert y[0].isfinite().all()
    assert not y[1].isfinite().any()


def test_outliers_and_tiny_numbers_keep_their_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fixed point is by blocks: one huge input costs the others of its own block only."""
    monkeypatch.setenv(crossing.SWITCH, "100")
    layout = Affine((64, 512), 4, 128, "integer", BRAIN)
    tensors = tensors_of(layout)
    matrix = decoded(layout, tensors, torch.float64).T
    x = torch.randn(4, 512, generator=torch.Generator().manual_seed(3))
    x[0] *= 1e-30
    x[1] *= 1e30
    x[2, 5] = 3000
    x[3, :256] *= 1e-6
    x = x.bfloat16()
    exact = x.double() @ matrix
    dense = (x.float() @ matrix.bfloat16().float()).bfloat16()
    y = layout.matmul(x, tensors, False)
    assert ((y.double() - exact).norm(dim=1) <= 2 * (dense.double() - exact).norm(dim=1)).all()


def test_encoding_finds_the_codes_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    for table, block in ((TABLE, 64), (TABLE[:4], 7), (NESTED.table, 100), (TABLE[::-1], 64)):
        layout = Codebook((37, 100), table, block)
        weight = torch.randn(layout.shape, generator=torch.Generator().manual_seed(4))
        weight[3] = 0
        weight[5, :50] *= 1e-42
        weight[7, 8:20] = (table[0] + table[1]) / 2  # halfway, in blocks whose scale is 1
        weight[7, 20] = 1.0
        found = layout.encode(weight)
        with monkeypatch.context() as patch:
            patch.setenv(dispatch.SWITCH, "reference")
            expected = layout.encode(weight)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_float64_takes_the_reference() -> None:
    tensors = tensors_of(LAYOUTS[3])
    assert dispatch.kernel_for(LAYOUTS[3], tensors, torch.float64) is None
    assert dispatch.kernel_for(LAYOUTS[3], tensors, BRAIN) is cpu.AFFINE


def test_a_crossing_is_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(crossing.SWITCH, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    crossing._known.cache_clear()
    asked = []

    def seconds(rows: int, fused: bool) -> float:
        asked.append(rows)
        return rows * 1.0 if fused else 20.0

    few, many = crossing.without_measuring(2), crossing.without_measuring(5000)
    assert few is not None
    assert few >= 2
    assert many is not None
    assert many < 5000
    assert crossing.without_measuring(30) is None
    assert crossing.fused_rows("here", seconds) == 16
    assert max(asked) == 32
    asked.clear()
    crossing._known.cache_clear()  # as another process would
    assert crossing.fused_rows("here", seconds) == 16
    assert not asked
    assert crossing.measured() == {"here": 16}
    crossing.crossings_file().write_text("{")
    crossing._known.cache_clear()
    assert crossing.fused_rows("here", seconds) == 16
    assert asked
    crossing._known.cache_clear()


def test_a_crossing_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(crossing.SWITCH, "few")
    with pytest.raises(OptionError, match="MODQ_FUSED_ROWS='few', expected a number of rows"):
        LAYOUTS[3].matmul(torch.ones(1, 576), tensors_of(LAYOUTS[3]), False)

"""The codebook layout against its formula in float64: all widths, straddling blocks, nested scales."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from modq.errors import DtypeError, OptionError, ShapeError, WeightError
from modq.kernels import dispatch
from modq.layouts import Codebook, NestedScales, _slices, codebook

ALL = slice(None)
SIXTEEN = tuple((torch.linspace(-1, 1, 16) ** 3).tolist())
UNORDERED = (0.0, 0.01, 0.6, 1.0, 0.3, 0.5, 0.2, 0.25, -0.0, -0.01, -0.6, -1.0, -0.3, -0.5, -0.2, -0.25)
NESTED = NestedScales(tuple(torch.linspace(-1, 1, 256).tolist()), 16)
KINDS = [
    Codebook((20, 64), SIXTEEN, 16),
    Codebook((20, 64), SIXTEEN, 32, NESTED),
    Codebook((63, 60), SIXTEEN, 64),  # blocks straddle rows, the last is short
    Codebook((63, 60), UNORDERED, 32, NESTED),
    Codebook((63, 61), SIXTEEN, 7, NestedScales(NESTED.table, 5)),
    Codebook((20, 33), (-1.0, 1.0), 33),
    Codebook((20, 33), (-1.0, 0.0, 0.5, 1.0), 11, NESTED),
    Codebook((20, 33), (-1.0, -0.6, -0.3, 0.0, 0.2, 0.4, 0.7, 1.0), 10),
    Codebook((1, 50), SIXTEEN, 16, NESTED),
    Codebook((50, 1), SIXTEEN, 16, NESTED),
    Codebook((3, 5), SIXTEEN, 4096, NESTED),  # one short block
]
layouts = pytest.mark.parametrize(
    "layout",
    KINDS,
    ids=lambda layout: f"{layout.bits}-{layout.shape}-{layout.block_size}-{bool(layout.nested)}",
)


def make(layout: Codebook) -> tuple[dict[str, Tensor], Tensor]:
    """Random tensors of a layout, and the matrix that the formula gives for them in float64."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, len(layout.table), layout.shape, generator=generator, dtype=torch.uint8)
    tensors = layout.pack(codes, torch.rand(layout.blocks, generator=generator) + 0.5)
    table = torch.tensor(layout.table).double()  # float32 numbers
    block = torch.arange(codes.numel()) // layout.block_size
    return tensors, table[codes.long()] * scales_of(layout, tensors)[block].view(layout.shape)


def scales_of(layout: Codebook, tensors: dict[str, Tensor]) -> Tensor:
    if layout.nested is None:
        return tensors["scales"].double()
    second = tensors["scale_scales"].double().repeat_interleave(layout.nested.block_size)[: layout.blocks]
    table = torch.tensor(layout.nested.table).double()
    return table[tensors["scale_codes"].long()] * second + tensors["scale_offset"].double()


@layouts
def test_the_tensors_are_those_described_and_the_codes_come_back(layout: Codebook) -> None:
    tensors, _ = make(layout)
    assert {name: (spec.shape, spec.dtype) for name, spec in layout.specs().items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()
    }
    assert all(tensor.ndim > 0 for tensor in tensors.values())
    assert torch.equal(
        layout.unpack(tensors),
        torch.randint(
            0, len(layout.table), layout.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8
        ),
    )


@layouts
def test_dequantizing_in_float64_is_the_formula(layout: Codebook) -> None:
    tensors, expected = make(layout)
    assert torch.equal(layout.dequantize(tensors, torch.float64, ALL, ALL), expected)


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantizing_computes_in_float32_and_rounds_once(layout: Codebook, dtype: torch.dtype) -> None:
    tensors, expected = make(layout)
    dense = layout.dequantize(tensors, torch.float32, ALL, ALL)
    torch.testing.assert_close(dense.double(), expected, rtol=2**-21, atol=0)  # three products and a sum
    rounded = layout.dequantize(tensors, dtype, ALL, ALL)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, dense.to(dtype))


@layouts
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_slices_equal_the_whole(
    layout: Codebook, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, _ = make(layout)
    whole = layout.dequantize(tensors, dtype, ALL, ALL)
    monkeypatch.setattr(_slices, "BLOCK_ELEMENTS", 100)
    for rows, columns in product(_some_slices(layout.shape[0]), _some_slices(layout.shape[1])):
        part = layout.dequantize(tensors, dtype, rows, columns)
        assert part.is_contiguous()
        assert torch.equal(part, whole[rows, columns]), (rows, columns)


def _some_slices(n: int) -> list[slice]:
    return [
        slice(None),
        slice(0, n),
        slice(n, n),
        slice(n // 3, n - n // 5),
        slice(n // 2, n // 2 + 1),
        slice(n - 1, n),
    ]


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transpose", [False, True])
def test_a_product_is_as_close_as_the_dense_product(
    layout: Codebook, dtype: torch.dtype, transpose: bool
) -> None:
    tensors, exact = make(layout)
    matrix = exact if transpose else exact.T
    generator = torch.Generator().manual_seed(1)
    for leading in ((), (1,), (2, 3), (300,)):
        x = torch.randn(*leading, len(matrix), generator=generator).to(dtype)
        reference = x.double() @ matrix
        y = layout.matmul(x, tensors, transpose)
        assert y.dtype == dtype
        assert y.shape == reference.shape
        dense_error = (x @ matrix.to(dtype) - reference).norm()
        # where the dense product happens to be exact: a part of what one rounding of the operands costs
        floor = x.double().norm() * matrix.norm() * torch.finfo(dtype).eps / 8
        assert (y - reference).norm() <= 2 * dense_error + floor, leading


def test_a_product_by_blocks_equals_the_product_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    blockwise = dispatch.multiply_blocks
    monkeypatch.setattr(dispatch, "multiply_blocks", lambda *args, **_: blockwise(*args, block_elements=300))
    for layout in KINDS:
        tensors, exact = make(layout)
        for transpose in (False, True):
            x = torch.ones(2, layout.shape[0 if transpose else 1], dtype=torch.float64)
            y = layout.matmul(x, tensors, transpose)
            torch.testing.assert_close(y, x @ (exact if transpose else exact.T), rtol=1e-12, atol=1e-12)


@layouts
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_each_weight_takes_the_nearest_entry(layout: Codebook, dtype: torch.dtype) -> None:
    weight = torch.randn(layout.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(
        dtype
    )
    plain = Codebook(layout.shape, layout.table, layout.block_size)
    tensors = plain.encode(weight)
    absmax = torch.stack([run.abs().max() for run in weight.float().flatten().split(layout.block_size)])
    block = torch.arange(weight.numel()) // layout.block_size
    assert torch.equal(tensors["scales"], absmax)
    table = torch.tensor(layout.table).double()
    distances = (weight.flatten().double()[:, None] / absmax.double()[block, None] - table).abs()
    chosen = distances.gather(1, plain.unpack(tensors).flatten().long()[:, None])[:, 0]
    assert (chosen - distances.min(dim=1).values).abs().max() < 2**-22
    assert torch.equal(layout.encode(weight)["codes"], tensors["codes"])


def test_a_tie_goes_to_the_lesser_number_in_a_table_of_any_order() -> None:
    layout = Codebook((1, 8), (0.0, 1.0, -1.0, 0.5), 8)
    weight = torch.tensor([[1.0, 0.75, 0.25, 0.0, -0.5, -1.0, 0.76, -0.49]])
    assert layout.unpack(layout.encode(weight)).tolist() == [[1, 3, 0, 0, 2, 2, 1, 0]]


def test_encoding_in_several_parts_equals_encoding_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(4)
    for layout in KINDS:
        weight = torch.randn(layout.shape, generator=generator)
        whole = layout.encode(weight)
        with monkeypatch.context() as patch:
            patch.setattr(codebook, "BLOCK_ELEMENTS", 150)
            parts = layout.encode(weight)
        assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_blocks_of_zeros_stay_zeros() -> None:
    for layout in KINDS:
        if 0.0 in layout.table:
            tensors = layout.encode(torch.zeros(layout.shape))
            assert not layout.dequantize(tensors, torch.float32, ALL, ALL).any()


def test_nested_scales_are_within_half_a_step() -> None:
    layout, plain = KINDS[1], Codebook((20, 64), SIXTEEN, 32)
    weight = torch.randn(20, 64, generator=torch.Generator().manual_seed(5))
    tensors, scales = layout.encode(weight), plain.encode(weight)["scales"].double()
    half_step = tensors["scale_scales"].double().repeat_interleave(16)[: layout.blocks] / 255
    assert ((scales_of(layout, tensors) - scales).abs() <= half_step * (1 + 1e-5)).all()
    assert torch.equal(tensors["scale_offset"], scales.float().mean().view(1))


def test_nothing_given_is_changed_or_kept() -> None:
    layout = KINDS[3]
    weight = torch.nn.Parameter(torch.randn(63, 60, generator=torch.Generator().manual_seed(6)))
    before, state = weight.detach().clone(), torch.get_rng_state()
    tensors = layout.encode(weight)
    packed = {name: tensor.clone() for name, tensor in tensors.items()}
    layout.dequantize(tensors, torch.float32, ALL, ALL)
    layout.matmul(torch.ones(60), tensors, False)
    assert torch.equal(weight, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensors[name], packed[name]) for name in tensors)
    assert not any(tensor.requires_grad for tensor in tensors.values())


def test_a_table_first_used_in_inference_mode_serves_outside_it() -> None:
    layout = Codebook((4, 6), tuple(k / 7 for k in range(-8, 8)), 3)
    with torch.inference_mode():
        tensors = layout.encode(torch.ones(4, 6))
        layout.dequantize(tensors, torch.float32, ALL, ALL)
    outside = layout.encode(torch.ones(4, 6))
    dense = layout.dequantize(outside, torch.float32, ALL, ALL)
    (dense * torch.ones(4, 6, requires_grad=True)).sum().backward()


def test_layouts_are_values() -> None:
    assert len({Codebook((4, 4), SIXTEEN, 8, NESTED), Codebook((4, 4), SIXTEEN, 8, NESTED)}) == 1
    assert Codebook((4, 4), SIXTEEN, 8, NESTED) != Codebook((4, 4), SIXTEEN, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (((4, 0), SIXTEEN, 8), ShapeError, r"shape=\(4, 0\)"),
        (((4, 4), SIXTEEN[:5], 8), OptionError, "a table of 5 entries, expected 2 or 4 or 8 or 16"),
        (((4, 4), SIXTEEN, 0), OptionError, "block_size=0, expected at least 1"),
    ],
)
def test_what_is_no_layout_is_refused(arguments: tuple, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        Codebook(*arguments)


def test_a_nested_table_has_256_entries() -> None:
    with pytest.raises(OptionError, match="a table of 16 entries, expected 256"):
        NestedScales(SIXTEEN)


@pytest.mark.parametrize(
    ("weight", "error", "said"),
    [
        (torch.zeros(4, 5), ShapeError, r"'weight' has shape \(4, 5\), expected \(4, 6\)"),
        (torch.zeros(24), ShapeError, r"'weight' has shape \(24,\)"),
        (torch.zeros(4, 6, dtype=torch.int32), DtypeError, "torch.int32, expected a floating point dtype"),
        (torch.full((4, 6), torch.nan), WeightError, "'scales' would hold NaN or Inf"),
        (torch.full((4, 6), torch.inf), WeightError, "finite in float32"),
        (torch.full((4, 6), 1e300, dtype=torch.float64), WeightError, "finite in float32"),
    ],
)
def test_what_cannot_be_encoded_is_refused(weight: Tensor, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        Codebook((4, 6), SIXTEEN, 8).encode(weight)


@pytest.mark.parametrize(
    ("codes", "scales", "error"),
    [
        (torch.zeros(4, 6), torch.ones(3), DtypeError),
        (torch.zeros(6, 4, dtype=torch.uint8), torch.ones(3), ShapeError),
        (torch.full((4, 6), 16, dtype=torch.uint8), torch.ones(3), OptionError),
        (torch.zeros(4, 6, dtype=torch.uint8), torch.ones(4), ShapeError),
        (torch.zeros(4, 6, dtype=torch.uint8), torch.ones(3).half(), DtypeError),
        (torch.zeros(4, 6, dtype=torch.uint8), torch.ones(3) / 0, WeightError),
    ],
)
def test_what_does_not_fit_the_layout_is_not_packed(
    codes: Tensor, scales: Tensor, error: type[Exception]
) -> None:
    with pytest.raises(error):
        Codebook((4, 6), SIXTEEN, 8).pack(codes, scales)


def test_tensors_of_another_layout_are_refused() -> None:
    plain, nested = KINDS[0], Codebook((20, 64), SIXTEEN, 16, NESTED)
    tensors, _ = make(plain)
    with pytest.raises(
        ShapeError, match="no tensor 'scale_codes', given 'codes', 'scales'; expected 'codes', "
    ):
        nested.dequantize(tensors, torch.float32, ALL, ALL)
    with pytest.raises(ShapeError, match=r"'scales' has shape \(80,\), expected \(40,\)"):
        Codebook((20, 64), SIXTEEN, 32).matmul(torch.ones(64), tensors, False)
    with pytest.raises(ShapeError, match=r"x has shape \(\), expected \(..., 64\)"):
        plain.matmul(torch.tensor(1.0), tensors, False)

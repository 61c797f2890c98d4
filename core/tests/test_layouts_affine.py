"""The affine layout against its formula in float64, at every width, kind of zero and raggedness."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from modq.errors import DtypeError, OptionError, ShapeError
from modq.layouts import Affine, _slices

ALL = slice(None)
KINDS = [
    Affine((63, 60), 4, 16, "integer", torch.float16),
    Affine((63, 60), 3, 7, "integer", torch.bfloat16),
    Affine((20, 33), 2, 8, "float", torch.float32),
    Affine((20, 33), 1, 100, "float", torch.float16),
    Affine((17, 64), 8, 64, "symmetric", torch.float32),
    Affine((17, 65), 3, 32, "symmetric", torch.float16),
    Affine((1, 9), 4, 4, "integer", torch.float32),
    Affine((9, 1), 4, 4, "float", torch.float32),
    Affine((63, 60), 4, 16, "integer", torch.float16, permuted=True),
    Affine((20, 33), 3, 8, "float", torch.bfloat16, permuted=True),
    Affine((17, 64), 8, 64, "symmetric", torch.float32, permuted=True),
]
layouts = pytest.mark.parametrize(
    "layout", KINDS, ids=lambda layout: f"{layout.bits}-{layout.zeros}-{layout.shape}"
)


def make(layout: Affine) -> tuple[dict[str, Tensor], Tensor]:
    """Random tensors of a layout, and the matrix that the formula gives for them in float64."""
    generator = torch.Generator().manual_seed(0)
    (rows, columns), groups, top = layout.shape, layout.groups, 2**layout.bits
    codes = torch.randint(0, top, layout.shape, generator=generator, dtype=torch.uint8)
    scales = torch.randn(rows, groups, generator=generator).to(layout.scale_dtype)  # of both signs
    zeros = position = None
    if layout.zeros == "integer":
        zeros = torch.randint(0, top, (rows, groups), generator=generator, dtype=torch.uint8)
    elif layout.zeros == "float":
        zeros = (torch.rand(rows, groups, generator=generator) * top).to(layout.scale_dtype)
    place = torch.arange(columns)
    if layout.permuted:
        place = torch.randperm(columns, generator=generator)
        position = place.int()
    group = place // layout.group_size
    zero = torch.full((rows, groups), top // 2) if zeros is None else zeros
    expected = scales.double()[:, group] * (codes.double()[:, place] - zero.double()[:, group])
    return layout.pack(codes, scales, zeros, position), expected


@layouts
def test_the_tensors_are_those_described_and_the_codes_come_back(layout: Affine) -> None:
    tensors, _ = make(layout)
    assert {name: (spec.shape, spec.dtype) for name, spec in layout.specs().items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()
    }
    repacked = layout.pack(
        layout.unpack(tensors),
        tensors["scales"],
        *((_zeros(layout, tensors), tensors.get("position"))),
    )
    assert all(torch.equal(repacked[name], tensors[name]) for name in tensors)


def _zeros(layout: Affine, tensors: dict[str, Tensor]) -> Tensor | None:
    if layout.zeros != "integer":
        return tensors.get("zeros")
    return layout._decode_zeros(tensors, torch.float32, ALL, slice(0, layout.groups)).to(torch.uint8)


@layouts
def test_dequantizing_in_float64_is_the_formula(layout: Affine) -> None:
    tensors, expected = make(layout)
    assert torch.equal(layout.dequantize(tensors, torch.float64, ALL, ALL), expected)


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantizing_computes_in_float32_and_rounds_once(layout: Affine, dtype: torch.dtype) -> None:
    tensors, expected = make(layout)
    dense = layout.dequantize(tensors, torch.float32, ALL, ALL)
    # q - z and the product round once each, q - z only if z is no integer
    assert torch.allclose(dense.double(), expected, rtol=2**-22, atol=2**-20 * 2**-layout.bits)
    rounded = layout.dequantize(tensors, dtype, ALL, ALL)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, dense.to(dtype))


@layouts
def test_slices_equal_the_whole(layout: Affine, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, expected = make(layout)
    monkeypatch.setattr(_slices, "BLOCK_ELEMENTS", 100)
    for rows, columns in product(_some_slices(layout.shape[0]), _some_slices(layout.shape[1])):
        part = layout.dequantize(tensors, torch.float64, rows, columns)
        assert part.is_contiguous()
        assert torch.equal(part, expected[rows, columns]), (rows, columns)


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
    layout: Affine, dtype: torch.dtype, transpose: bool
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
    from modq.kernels import dispatch

    blockwise = dispatch.multiply_blocks
    monkeypatch.setattr(dispatch, "multiply_blocks", lambda *args, **_: blockwise(*args, block_elements=300))
    for layout in KINDS:
        tensors, exact = make(layout)
        for transpose in (False, True):
            x = torch.ones(2, layout.shape[0 if transpose else 1], dtype=torch.float64)
            y = layout.matmul(x, tensors, transpose)
            torch.testing.assert_close(y, x @ (exact if transpose else exact.T), rtol=1e-12, atol=1e-10)


def test_a_float64_product_sees_the_float64_matrix() -> None:
    tensors, exact = make(KINDS[3])
    x = torch.eye(33, dtype=torch.float64)
    assert torch.equal(KINDS[3].matmul(x, tensors, False), exact.T)


def test_nothing_given_is_changed_or_kept() -> None:
    layout = KINDS[8]
    tensors, _ = make(layout)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    x = torch.randn(3, 60, generator=torch.Generator().manual_seed(2))
    kept = x.clone()
    state = torch.get_rng_state()
    layout.dequantize(tensors, torch.float32, ALL, ALL)
    layout.matmul(x, tensors, False)
    repacked = layout.pack(
        layout.unpack(tensors), tensors["scales"], _zeros(layout, tensors), tensors["position"]
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, kept)
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)
    assert all(repacked[name].data_ptr() != tensors[name].data_ptr() for name in tensors)


def test_layouts_are_values() -> None:
    one = Affine((4, 4), 4, 2, "integer", torch.float16)
    assert one == Affine((4, 4), 4, 2, "integer", torch.float16)
    assert (
        len(
            {
                one,
                Affine((4, 4), 4, 2, "integer", torch.float16),
                Affine((4, 4), 3, 2, "float", torch.float16),
            }
        )
        == 2
    )


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (((0, 4), 4, 2, "integer", torch.float16), ShapeError, r"shape=\(0, 4\)"),
        (((4,), 4, 2, "integer", torch.float16), ShapeError, "expected .out_features, in_features."),
        (((4, 4), 5, 2, "integer", torch.float16), OptionError, "bits=5, expected one of 1, 2, 3, 4, 8"),
        (((4, 4), 4, 0, "integer", torch.float16), OptionError, "group_size=0, expected at least 1"),
        (((4, 4), 4, 2, "int", torch.float16), OptionError, "zeros='int', expected 'symmetric' or"),
        (((4, 4), 4, 2, "integer", torch.int8), DtypeError, "torch.int8, expected a floating point dtype"),
    ],
)
def test_what_is_no_layout_is_refused(arguments: tuple, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        Affine(*arguments)


CODES = torch.zeros(4, 6, dtype=torch.uint8)
SCALES = torch.ones(4, 2, dtype=torch.float16)
ZEROS = torch.ones(4, 2, dtype=torch.uint8)
POSITION = torch.arange(6, dtype=torch.int32)


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ((CODES[:3], SCALES, ZEROS, POSITION), ShapeError, r"'codes' has shape \(3, 6\), expected \(4, 6\)"),
        ((CODES.int(), SCALES, ZEROS, POSITION), DtypeError, "'codes' is torch.int32, expected torch.uint8"),
        ((CODES + 16, SCALES, ZEROS, POSITION), OptionError, "a code is 16, expected 0 to 15"),
        ((CODES, SCALES.float(), ZEROS, POSITION), DtypeError, "'scales' is torch.float32"),
        ((CODES, SCALES[:, :1], ZEROS, POSITION), ShapeError, "'scales' has shape"),
        ((CODES, SCALES, None, POSITION), OptionError, "zeros is None, expected a tensor .* zeros='integer'"),
        ((CODES, SCALES, SCALES, POSITION), DtypeError, "'zeros' is torch.float16"),
        ((CODES, SCALES, ZEROS, None), OptionError, "position is None, expected a tensor"),
        ((CODES, SCALES, ZEROS, POSITION.long()), DtypeError, "'position' is torch.int64"),
        ((CODES, SCALES, ZEROS, POSITION // 2), OptionError, "position is no permutation"),
    ],
)
def test_what_does_not_fit_the_layout_is_not_packed(given: tuple, error: type[Exception], said: str) -> None:
    layout = Affine((4, 6), 4, 3, "integer", torch.float16, permuted=True)
    layout.pack(CODES, SCALES, ZEROS, POSITION)
    with pytest.raises(error, match=said) as caught:
        layout.pack(*given)
    assert "\n" not in str(caught.value)


def test_a_symmetric_layout_takes_no_zeros() -> None:
    with pytest.raises(OptionError, match="zeros is a tensor, expected None in a layout with zeros"):
        Affine((4, 6), 4, 3, "symmetric", torch.float16).pack(CODES, SCALES, ZEROS)


@pytest.mark.parametrize(
    ("rows", "columns"),
    [(slice(0, 64), ALL), (ALL, slice(-2, 60)), (slice(0, 9, 2), ALL), (ALL, slice(9, 3))],
)
def test_a_slice_that_leaves_the_matrix_is_refused(rows: slice, columns: slice) -> None:
    tensors, _ = make(KINDS[0])
    with pytest.raises(ShapeError, match="and step 1"):
        KINDS[0].dequantize(tensors, torch.float32, rows, columns)


def test_products_and_tensors_that_do_not_fit_are_refused() -> None:
    layout = KINDS[0]
    tensors, _ = make(layout)
    with pytest.raises(
        ShapeError, match=r"x has shape \(2, 63\), expected \(\.\.\., 60\), the in_features of \(63, 60\)"
    ):
        layout.matmul(torch.zeros(2, 63), tensors, False)
    with pytest.raises(ShapeError, match="out_features"):
        layout.matmul(torch.zeros(60), tensors, True)
    with pytest.raises(DtypeError, match="expected a floating point dtype"):
        layout.matmul(torch.zeros(60, dtype=torch.int64), tensors, False)
    with pytest.raises(DtypeError, match="expected a floating point dtype"):
        layout.dequantize(tensors, torch.uint8, ALL, ALL)
    with pytest.raises(ShapeError, match="no tensor 'zeros'"):
        layout.unpack({"codes": tensors["codes"], "scales": tensors["scales"]})
    with pytest.raises(DtypeError, match=r"'scales' is torch\.float32, expected torch\.float16"):
        layout.matmul(torch.zeros(60), {**tensors, "scales": tensors["scales"].float()}, False)

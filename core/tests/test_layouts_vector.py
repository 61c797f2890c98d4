"""The vector codebook layout against its formula in float64, and its compiled kernel against the layout."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from torch import Tensor

from modq.errors import DtypeError, OptionError, ShapeError
from modq.kernels import cpu, crossing, dispatch
from modq.kernels.library import isas, library, use_isa
from modq.layouts import VectorCodebook, _slices

ALL = slice(None)
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
KINDS = [
    VectorCodebook((20, 64), 1, 16, HALF),
    VectorCodebook((21, 104), 2, 8, HALF),
    VectorCodebook((63, 1080), 2, 8, BRAIN),
    VectorCodebook((19, 272), 1, 8, FULL),
    VectorCodebook((5, 24), 2, 16, BRAIN),
    VectorCodebook((33, 96), 3, 5, FULL, 16),
    VectorCodebook((9, 160), 8, 8, HALF, 32),
    VectorCodebook((7, 40), 1, 12, FULL),
    VectorCodebook((12, 8), 1, 1, HALF),
    VectorCodebook((10, 15), 2, 3, FULL, 5),  # no kernel reads vectors of 5
]
layouts = pytest.mark.parametrize("layout", KINDS, ids=lambda layout: f"{layout.kind}-{layout.shape}")
dtypes = pytest.mark.parametrize("dtype", [FULL, BRAIN, HALF], ids=str)

opened = library()


@pytest.fixture(params=["reference"] if opened is None else ["reference", *isas(opened)], autouse=True)
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What computes: the reference, or the kernel on an instruction set of this machine."""
    if opened is None or request.param == "reference":
        monkeypatch.setenv(dispatch.SWITCH, "reference")
        yield request.param
        return
    use_isa(opened, request.param)
    yield request.param
    use_isa(opened, None)


def draw(layout: VectorCodebook) -> tuple[Tensor, Tensor, Tensor]:
    """Random codes, codebooks and scales."""
    generator = torch.Generator().manual_seed(0)
    runs = (layout.shape[0], layout.shape[1] // layout.vector_size, layout.codebooks)
    codes = torch.randint(0, 2**layout.bits, runs, generator=generator, dtype=torch.int32)
    codebooks = torch.randn(layout.codebooks, 2**layout.bits, layout.vector_size, generator=generator)
    scales = torch.randn(layout.shape[0], generator=generator)  # negative ones, too
    return codes, codebooks.to(layout.dtype), scales.to(layout.dtype)


def make(layout: VectorCodebook) -> tuple[dict[str, Tensor], Tensor]:
    """Random tensors of a layout, and the matrix that the formula gives for them in float64."""
    codes, codebooks, scales = draw(layout)
    vectors = sum(codebooks[m].double()[codes[..., m].long()] for m in range(layout.codebooks))
    return layout.pack(codes, codebooks, scales), vectors.view(layout.shape) * scales.double()[:, None]


@layouts
def test_the_tensors_are_those_described_and_the_codes_come_back(layout: VectorCodebook) -> None:
    tensors, _ = make(layout)
    assert {name: (spec.shape, spec.dtype) for name, spec in layout.specs().items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()
    }
    assert torch.equal(layout.unpack(tensors), draw(layout)[0])


@layouts
def test_dequantizing_in_float64_is_the_formula(layout: VectorCodebook) -> None:
    tensors, expected = make(layout)
    assert torch.equal(layout.dequantize(tensors, torch.float64, ALL, ALL), expected)


@layouts
@dtypes
def test_dequantizing_computes_in_float32_and_rounds_once(layout: VectorCodebook, dtype: torch.dtype) -> None:
    tensors, _ = make(layout)
    codes, codebooks, scales = draw(layout)
    vectors = codebooks[0].float()[codes[..., 0].long()]
    for book in range(1, layout.codebooks):
        vectors = vectors + codebooks[book].float()[codes[..., book].long()]
    expected = vectors.view(layout.shape) * scales.float()[:, None]
    assert torch.equal(layout.dequantize(tensors, dtype, ALL, ALL), expected.to(dtype))


@layouts
@pytest.mark.parametrize("dtype", [torch.float64, FULL, BRAIN], ids=str)
def test_slices_equal_the_whole(
    layout: VectorCodebook, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, _ = make(layout)
    whole = layout.dequantize(tensors, dtype, ALL, ALL)
    monkeypatch.setattr(_slices, "BLOCK_ELEMENTS", 100)
    for rows, columns in product(_some_slices(layout.shape[0]), _some_slices(layout.shape[1])):
        part = layout.dequantize(tensors, dtype, rows, columns)
        assert part.is_contiguous()
        assert torch.equal(part, whole[rows, columns]), (rows, columns)


def _some_slices(n: int) -> list[slice]:
    return [slice(None), slice(n, n), slice(n // 3, n - n // 5), slice(n // 2, n // 2 + 1), slice(n - 1, n)]


@pytest.mark.parametrize("fused_rows", ["0", "100"])
@pytest.mark.parametrize("transpose", [False, True])
@layouts
def test_a_product_is_as_close_as_the_dense_product(
    layout: VectorCodebook, transpose: bool, fused_rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(crossing.SWITCH, fused_rows)
    tensors, exact = make(layout)
    matrix = exact if transpose else exact.T
    generator = torch.Generator().manual_seed(1)
    for dtype, leading in product((FULL, BRAIN, HALF), ((), (1,), (2, 1), (7,), (2, 19))):
        x = torch.randn(*leading, len(matrix), generator=generator).to(dtype)
        reference = x.double() @ matrix
        y = layout.matmul(x, tensors, transpose)
        assert y.dtype == dtype
        assert y.shape == reference.shape
        # in float32 but for the operands and the result: torch's own loops for halves differ by CPU
        dense_error = ((x.float() @ matrix.to(dtype).float()).to(dtype) - reference).norm()
        # a handful of outputs is luck: what each operand's rounding may cost is always allowed
        floor = x.double().norm() * matrix.norm() * torch.finfo(dtype).eps / 8
        assert (y - reference).norm() <= 2 * dense_error + floor, (dtype, leading)


def test_products_are_bit_equal_from_run_to_run_and_by_any_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(crossing.SWITCH, "100")
    before = torch.get_num_threads()
    try:
        for layout in (VectorCodebook((300, 1024), 2, 8, HALF), VectorCodebook((300, 1024), 1, 16, BRAIN)):
            tensors, _ = make(layout)
            x = torch.randn(3, 1024, generator=torch.Generator().manual_seed(2))
            for rows in (1, 3):
                torch.set_num_threads(2)
                twice = [layout.matmul(x[:rows], tensors, False) for _ in range(2)]
                torch.set_num_threads(1)
                assert torch.equal(*twice)
                torch.testing.assert_close(layout.matmul(x[:rows], tensors, False), twice[0])
    finally:
        torch.set_num_threads(before)


@layouts
def test_a_kernel_takes_what_it_can_read(layout: VectorCodebook, by: str) -> None:
    tensors, _ = make(layout)
    kernel = cpu.VECTOR if by != "reference" and layout.vector_size % 8 == 0 else None
    assert dispatch.kernel_for(layout, tensors, BRAIN) is kernel
    assert dispatch.kernel_for(layout, tensors, torch.float64) is None


def test_bits_above_the_width_of_a_code_are_ignored() -> None:
    layout = VectorCodebook((33, 96), 3, 5, FULL, 16)
    tensors, _ = make(layout)
    wider = tensors | {"codes": tensors["codes"] | 0xE0}
    x = torch.ones(1, 96)
    for way in (
        lambda given: layout.dequantize(given, FULL, ALL, ALL),
        lambda given: layout.matmul(x, given, False),
        layout.unpack,
    ):
        assert torch.equal(way(wider), way(tensors))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_in_x_is_seen_in_its_row_only(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(crossing.SWITCH, "100")
    layout = KINDS[1]
    x = torch.ones(2, layout.shape[1], dtype=BRAIN)
    x[1, 7] = bad
    y = layout.matmul(x, make(layout)[0], False)
    assert y[0].isfinite().all()
    assert not y[1].isfinite().any()


def test_nothing_given_is_changed_or_kept() -> None:
    layout = KINDS[1]
    given = draw(layout)
    before = [tensor.clone() for tensor in given]
    tensors = layout.pack(given[0], torch.nn.Parameter(given[1]), given[2])
    packed = {name: tensor.clone() for name, tensor in tensors.items()}
    layout.dequantize(tensors, FULL, ALL, ALL)[:] = 0
    layout.matmul(torch.ones(layout.shape[1]), tensors, False)
    assert all(torch.equal(tensor, old) for tensor, old in zip(given, before, strict=True))
    assert all(torch.equal(tensors[name], packed[name]) for name in packed)
    assert not any(tensor.requires_grad for tensor in tensors.values())
    tensors["codebooks"].zero_()
    assert torch.equal(given[1], before[1])


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (((4, 0), 1, 16, HALF), ShapeError, r"shape=\(4, 0\)"),
        (((4, 12), 1, 16, HALF), ShapeError, "in_features=12 is no multiple of vector_size=8"),
        (((4, 16), 0, 16, HALF), OptionError, "codebooks=0, expected at least 1"),
        (((4, 16), 1, 17, HALF), OptionError, "bits=17, expected 1 to 16"),
        (((4, 16), 1, 0, HALF), OptionError, "bits=0, expected 1 to 16"),
        (((4, 16), 1, 8, HALF, 0), OptionError, "vector_size=0, expected at least 1"),
        (((4, 16), 1, 8, torch.int8), DtypeError, "expected a floating point dtype"),
    ],
)
def test_what_is_no_layout_is_refused(arguments: tuple, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        VectorCodebook(*arguments)


def test_what_cannot_be_packed_is_refused() -> None:
    layout = KINDS[1]
    codes, codebooks, scales = draw(layout)
    for given, error, said in (
        ((codes.long(), codebooks, scales), DtypeError, "'codes' is torch.int64, expected torch.int32"),
        ((codes[:, 1:], codebooks, scales), ShapeError, r"'codes' has shape \(21, 12, 2\)"),
        ((codes, codebooks.float(), scales), DtypeError, "'codebooks' is torch.float32"),
        ((codes, codebooks[:1], scales), ShapeError, "'codebooks' has shape"),
        ((codes, codebooks, scales[1:]), ShapeError, "'scales' has shape"),
        ((codes + 1, codebooks, scales), OptionError, "codes from 1 to 256, expected from 0 to 255"),
        ((codes - 1, codebooks, scales), OptionError, "codes from -1 to"),
    ):
        with pytest.raises(error, match=said):
            layout.pack(*given)


def test_layouts_are_values() -> None:
    assert len({VectorCodebook((4, 8), 2, 8, HALF), VectorCodebook((4, 8), 2, 8, HALF)}) == 1
    assert VectorCodebook((4, 8), 2, 8, HALF) != VectorCodebook((4, 8), 1, 8, HALF)

"""The hqq backend: its options, its hooks, its layouts, and how much it loses."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product

import pytest
import torch
from torch import Tensor

import modq
from modq.errors import OptionError, WeightError
from modq.layouts import Affine, unpack_bits
from modq.spec import QuantizedWeight
from modq_hqq import INFO
from modq_hqq.grouped import Grouped
from modq_hqq.options import Options
from modq_hqq.quantizer import HQQ, _layout

ALL = slice(None)
hqq = HQQ()

# Groups inside rows, over rows, of whole rows and columns, short ones, and larger than the matrix.
KINDS = [
    ((24, 128), Options(4, 64)),
    ((24, 128), Options(3, 32, scale_dtype="bfloat16")),
    ((10, 96), Options(2, 64)),  # runs of the flat matrix that divide it
    ((63, 60), Options(4, 64)),  # and that do not
    ((63, 61), Options(3, 16, scale_dtype="float32")),
    ((5, 33), Options(1, None)),
    ((5, 33), Options(8, 0)),
    ((3, 7), Options(4, 64)),
    ((1, 1), Options(4, 64)),
    ((128, 24), Options(4, 64, 0)),  # groups of every 2nd row
    ((96, 10), Options(3, 64, 0)),  # groups that mix columns too
    ((63, 60), Options(2, 64, 0)),  # and some of which are a weight short
    ((63, 61), Options(8, 16, 0, "float32")),
    ((33, 5), Options(1, None, 0)),
    ((3, 7), Options(4, 64, 0)),
    ((1, 1), Options(4, 64, 0)),
]
every_kind = pytest.mark.parametrize(
    ("shape", "options"),
    KINDS,
    ids=lambda v: f"{v.bits}b{v.group_size}a{v.axis}" if isinstance(v, Options) else None,
)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dense(qweight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    return hqq.dequantize(qweight, dtype, ALL, ALL)


def groups_by_definition(shape: tuple[int, int], options: Options) -> Tensor:
    """The group of every weight, one weight at a time."""
    out_features, in_features = shape
    size = options.group_size or (in_features if options.axis == 1 else out_features)
    count = -(-out_features * in_features // size)
    numbers = [f // size if options.axis == 1 else f % count for f in range(out_features * in_features)]
    return torch.tensor(numbers).view(shape)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_becomes_the_tensors_described(shape, options, dtype) -> None:
    weight = gaussian(*shape, dtype=dtype)
    before, state = weight.clone(), torch.get_rng_state()
    qweight = modq.quantize(weight, "hqq", **{n: getattr(options, n) for n in Options.__dataclass_fields__})
    assert {name: (spec.shape, spec.dtype) for name, spec in hqq.describe(shape, options).items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in qweight.tensors.items()
    }
    assert json.loads(json.dumps(qweight.meta)) == qweight.meta
    assert torch.equal(weight, before)
    assert torch.equal(torch.get_rng_state(), state)
    again = hqq.quantize(weight, options)
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in qweight.tensors.items())


@every_kind
def test_decoding_is_the_formula(shape, options) -> None:
    qweight = hqq.quantize(gaussian(*shape), options)
    group = groups_by_definition(shape, options)
    codes = unpack_bits(qweight.tensors["codes"], options.bits, slice(0, shape[1])).double()
    scales, zeros = (qweight.tensors[name].flatten().double() for name in ("scales", "zeros"))
    assert torch.equal(dense(qweight, torch.float64), scales[group] * (codes - zeros[group]))


@every_kind
def test_every_weight_has_the_code_nearest_to_it(shape, options) -> None:
    weight = gaussian(*shape)
    qweight = hqq.quantize(weight, options)
    group = groups_by_definition(shape, options)
    scales, zeros = (qweight.tensors[name].flatten().double()[group] for name in ("scales", "zeros"))
    candidates = torch.arange(2.0**options.bits).double()[:, None, None]
    best = (scales * (candidates - zeros) - weight.double()).abs().amin(0)
    found = (dense(qweight, torch.float64) - weight.double()).abs()
    assert (found <= best + 1e-5 * weight.abs().max()).all()


@every_kind
def test_slices_equal_the_whole(shape, options) -> None:
    qweight = hqq.quantize(gaussian(*shape), options)
    whole = dense(qweight)
    for rows, columns in product(_some_slices(shape[0]), _some_slices(shape[1])):
        assert torch.equal(hqq.dequantize(qweight, torch.float32, rows, columns), whole[rows, columns])


def _some_slices(length: int) -> list[slice]:
    return [
        slice(0, length),
        slice(length // 3, length - length // 4),
        slice(length - 1, length),
        slice(0, 0),
    ]


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transpose", [False, True])
def test_products_are_as_close_as_the_dense_product(shape, options, dtype, transpose) -> None:
    qweight = hqq.quantize(gaussian(*shape), options)
    exact = dense(qweight, torch.float64)
    exact = exact if transpose else exact.T
    for leading in ((), (1,), (3, 5)):
        x = gaussian(*leading, shape[0 if transpose else 1], seed=1, dtype=dtype)
        wanted = x.double() @ exact
        ours = (modq.matmul(x, qweight, transpose).double() - wanted).norm()
        plain = (x @ exact.to(dtype)).double() - wanted
        assert ours <= 2 * plain.norm() + torch.finfo(dtype).eps * wanted.norm(), leading


@pytest.mark.parametrize(
    ("shape", "options"), [((9, 16), Options(4, 8)), ((9, 10), Options(3, 8)), ((8, 5), Options(4, 4, 0))]
)
@pytest.mark.parametrize("transpose", [False, True])
def test_gradients_are_those_of_the_matrix(shape, options, transpose) -> None:
    qweight = hqq.quantize(gaussian(*shape), options)
    x = gaussian(3, shape[0 if transpose else 1], dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: modq.matmul(v, qweight, transpose), x)


@pytest.mark.parametrize(
    ("axis", "shape"), [(1, (2, 96)), (1, (900, 672)), (0, (1024, 600)), (0, (1000, 650))]
)
def test_blocks_of_a_product_meet_everywhere(axis, shape) -> None:
    """More weights than a block has, so that each product takes several, cut at any row or column."""
    qweight = hqq.quantize(gaussian(*shape), Options(4, 64, axis))
    whole = dense(qweight)
    for x, expected, transpose in (
        (gaussian(2, shape[1]), whole.T, False),
        (gaussian(2, shape[0]), whole, True),
    ):
        torch.testing.assert_close(modq.matmul(x, qweight, transpose), x @ expected)


def test_groups_inside_rows_are_in_the_layout_of_the_core() -> None:
    assert isinstance(_layout((64, 128), Options(4, 64)), Affine)
    assert isinstance(_layout((64, 128), Options(4, None)), Affine)
    assert isinstance(_layout((64, 96), Options(4, 64)), Grouped)
    assert isinstance(_layout((64, 128), Options(4, 64, 0)), Grouped)


@pytest.mark.parametrize("bits", INFO.bits)
def test_the_declared_error_holds_and_is_not_slack(bits: int) -> None:
    weight = gaussian(512, 1024)
    loss = float((dense(hqq.quantize(weight, Options(bits))) - weight).norm() / weight.norm())
    assert loss <= INFO.max_relative_error[bits] <= 1.2 * loss


@pytest.mark.parametrize("bits", INFO.bits)
def test_scales_and_zeros_take_half_a_bit_at_groups_of_64(bits: int) -> None:
    assert hqq.quantize(gaussian(64, 640), Options(bits)).bits_per_weight == bits + 0.5
    assert hqq.quantize(gaussian(64, 640), Options(bits, axis=0)).bits_per_weight == bits + 0.5


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", INFO.bits)
def test_groups_of_one_number_come_back(bits: int, axis: int) -> None:
    weight = gaussian(64, 128)
    weight[:, 64:] = 0
    found = dense(hqq.quantize(weight, Options(bits, 64, axis)))
    assert not found[:, 64:].any()
    assert not dense(hqq.quantize(torch.zeros(7, 9), Options(bits, axis=axis))).any()
    constant = torch.full((64, 64), 0.5)
    assert torch.equal(dense(hqq.quantize(constant, Options(bits, axis=axis))), constant)


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
def test_the_extremes_of_float_are_quantized_with_wide_scales(scale_dtype: str) -> None:
    for scale in (1e-30, 1e-6, 1e30):
        weight = gaussian(8, 64) * scale
        found = dense(hqq.quantize(weight, Options(4, scale_dtype=scale_dtype))).double()
        assert (found - weight.double()).norm() <= 0.15 * weight.double().norm(), scale


def test_a_scale_beyond_float16_is_refused_and_the_way_out_named() -> None:
    with pytest.raises(WeightError, match=r"infinite in float16.*scale_dtype='float32' takes any"):
        hqq.quantize(gaussian(8, 64) * 1e30, Options())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_that_is_not_finite_is_refused(value: float) -> None:
    weight = gaussian(8, 64)
    weight[3, 3] = value
    for options in (Options(), Options(axis=0, scale_dtype="float32")):
        with pytest.raises(WeightError, match="expected finite weights"):
            hqq.quantize(weight, options)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"bits": 5}, "bits=5, expected 8 or 4 or 3 or 2 or 1"),
        ({"axis": 2}, "axis=2, expected 1 or 0"),
        ({"group_size": -1}, "group_size=-1"),
        ({"scale_dtype": "float64"}, "scale_dtype='float64', expected 'float16' or 'bfloat16'"),
        ({"iters": 0}, "iters=0"),
        ({"lp_norm": 0}, "lp_norm=0"),
        ({"lp_norm": 1.5}, "lp_norm=1.5"),
        ({"beta": 0.0}, "beta=0.0"),
        ({"kappa": -1.0}, "kappa=-1.0"),
        ({"kappa": float("nan")}, "kappa=nan"),
        ({"zero": 1}, "no option 'zero'; it has axis, beta, bits"),
    ],
)
def test_options_that_do_not_exist_are_refused(given: dict, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        modq.quantize(gaussian(4, 64), "hqq", **given)


def test_info_and_options_import_no_torch() -> None:
    code = "import sys, modq_hqq, modq_hqq.options; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

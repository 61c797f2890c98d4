"""The optq backend: its algorithm against a textbook in float64, its options, its hooks, and bad input."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import modq
from modq.errors import WeightError
from modq.spec import Calibration, QuantizedWeight
from modq_optq import INFO
from modq_optq.hessian import inverse_factor
from modq_optq.options import BITS, Options
from modq_optq.quantizer import OPTQ

ALL = slice(None)
optq = OPTQ()
ORDERS = [
    {"act_order": "none"},
    {"act_order": "group"},
    {"act_order": "full"},
    {"act_order": "full", "static_groups": True},
    {"act_order": "group", "static_groups": True},
]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hessian(n: int, rows: int = 0, noise: float = 1.0) -> Tensor:
    """Return the second moments of correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows or 4 * n, n, generator=generator) * torch.randn(n, generator=generator).exp() * noise
    x += torch.randn(x.shape[0], 4, generator=generator) @ torch.randn(4, n, generator=generator)
    return x.T @ x / x.shape[0]


def quantized(weight: Tensor, moments: Tensor, **options: object) -> QuantizedWeight:
    return modq.quantize(weight, "optq", Calibration(hessian=moments, samples=1), **options)


def output_error(found: Tensor, weight: Tensor, moments: Tensor) -> float:
    """Return the relative error of the layer's outputs, squared: tr(D H Dᵀ) / tr(W H Wᵀ)."""
    difference, weight, moments = found.double() - weight.double(), weight.double(), moments.double()
    return float((difference @ moments * difference).sum() / (weight @ moments * weight).sum())


def textbook(weight: Tensor, moments: Tensor, options: Options) -> Tensor:
    """Do OPTQ in float64, column by column, with H inverted anew after each: no blocks, no Cholesky."""
    w, h = weight.double(), moments.double()
    n = w.shape[1]
    size = min(options.group_size or n, n)
    h = h + options.damping * h.diagonal().mean() * torch.eye(n, dtype=h.dtype)
    order = list(range(n))
    if options.act_order == "full":
        order.sort(key=lambda i: -float(h[i, i]))
    if options.act_order == "group":
        groups = [order[i : i + size] for i in range(0, n, size)]
        ragged = [groups.pop()] if n % size else []
        for group in [*groups, *ragged]:
            group.sort(key=lambda i: -float(h[i, i]))
        groups.sort(key=lambda group: -float(h[group[0], group[0]]))
        order = [i for group in [*groups, *ragged] for i in group]
    w, found, grids = w.clone(), torch.zeros_like(w), {}
    for step, i in enumerate(order):
        moved = options.act_order == "full" and not options.static_groups
        group = step // size if moved else i // size
        if group not in grids:
            members = order[group * size : group * size + size] if moved else range(n)[group * size :][:size]
            source = weight.double() if options.static_groups else w
            grids[group] = textbook_grid(source[:, list(members)], options)
        scale, zero = grids[group]
        code = ((w[:, i] / scale).round() + zero).clamp(0, 2**options.bits - 1)
        found[:, i] = (code - zero) * scale
        rest = order[step:]
        inverse = torch.linalg.inv(h[rest][:, rest])
        # the least-squares answer of the columns that are left to the error of this one
        w[:, rest] -= ((w[:, i] - found[:, i]) / inverse[0, 0])[:, None] * inverse[0]
    return found


def textbook_grid(weights: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    top = 2**options.bits - 1
    low, high = weights.amin(1).clamp(max=0), weights.amax(1).clamp(min=0)
    if options.symmetric:
        scale = (2 * torch.maximum(-low, high) / top).half().double()
        return scale, torch.full_like(scale, 2 ** (options.bits - 1))
    scale = ((high - low) / top).half().double()
    return scale, (-low / scale).round()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize(("bits", "group_size"), [(2, 16), (3, None), (4, 20), (4, 64), (8, 7)])
def test_the_result_is_that_of_the_textbook(bits, group_size, order, symmetric):
    weight, moments = gaussian(24, 70), hessian(70)
    options = Options(bits, group_size, symmetric, **order)
    found = modq.dequantize(
        quantized(weight, moments, bits=bits, group_size=group_size, symmetric=symmetric, **order)
    )
    expected = textbook(weight, moments, options)
    # Every row on its own: one that lies on an edge between two codes may fall to the other side.
    same = torch.isclose(found.double(), expected, rtol=1e-6, atol=1e-9).all(1)
    assert same.double().mean() >= 0.9, same


def test_the_factor_is_that_of_the_inverse():
    moments = hessian(600)
    order = moments.diagonal().argsort()
    factor = inverse_factor(moments, order, 0.01, 1.0)
    damped = moments + 0.01 * moments.diagonal().mean() * torch.eye(600)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order].double()), upper=True)
    assert (factor - expected).norm() <= 1e-4 * expected.norm()
    assert not factor.tril(-1).any()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_outputs_err_far_less_than_with_rounding_to_nearest(bits, order):
    weight, moments = gaussian(96, 256), hessian(256, noise=0.2)
    nearest = modq.dequantize(quantized(weight, torch.eye(256), bits=bits, group_size=64, **order))
    found = modq.dequantize(quantized(weight, moments, bits=bits, group_size=64, **order))
    assert output_error(found, weight, moments) <= 0.2 * output_error(nearest, weight, moments)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_search_of_scales_helps_where_bits_are_few(symmetric):
    weight, moments = gaussian(96, 256), hessian(256)
    plain, searched = (
        modq.dequantize(quantized(weight, moments, bits=2, group_size=64, symmetric=symmetric, mse=mse))
        for mse in (False, True)
    )
    assert output_error(searched, weight, moments) <= 0.8 * output_error(plain, weight, moments)


@pytest.mark.parametrize("bits", BITS)
def test_the_declared_error_holds_and_is_not_slack(bits):
    weight = gaussian(512, 1024)
    x = gaussian(8192, 1024, seed=1)
    found = modq.dequantize(quantized(weight, x.T @ x / 8192, bits=bits))
    loss, declared = float((found - weight).norm() / weight.norm()), INFO.max_relative_error[bits]
    assert loss <= declared <= 1.25 * loss


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 128), (63, 60), (1, 100), (40, 1), (1, 1)])
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_a_weight_becomes_the_tensors_described(order, shape, dtype):
    weight, moments = gaussian(*shape).to(dtype), hessian(shape[1])
    options = Options(bits=3, group_size=24, symmetric=False, **order)
    before, state = weight.clone(), torch.get_rng_state()
    qweight, again = (optq.quantize(weight, options, Calibration(hessian=moments)) for _ in range(2))
    assert {name: (spec.shape, spec.dtype) for name, spec in optq.describe(shape, options).items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in qweight.tensors.items()
    }
    assert json.loads(json.dumps(qweight.meta)) == qweight.meta
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in qweight.tensors.items())
    assert all(tensor.view(torch.uint8) is not None for tensor in qweight.tensors.values())
    assert torch.equal(weight, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(moments, hessian(shape[1]))


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("order", ORDERS[2:4], ids=str)
@pytest.mark.parametrize(("bits", "group_size"), [(2, 16), (3, 25), (4, None), (8, 100)])
def test_slices_and_products_are_those_of_the_matrix(bits, group_size, order, scale_dtype):
    options = {
        "bits": bits,
        "group_size": group_size,
        "scale_dtype": scale_dtype,
        "symmetric": False,
        **order,
    }
    qweight = quantized(gaussian(63, 60), hessian(60), **options)
    whole = modq.dequantize(qweight, torch.float64)
    part = optq.dequantize(qweight, torch.float64, slice(5, 40), slice(7, 59))
    assert torch.equal(part, whole[5:40, 7:59])
    x, y = gaussian(2, 3, 60, seed=2).double(), gaussian(2, 63, seed=3).double()
    torch.testing.assert_close(modq.matmul(x, qweight), x @ whole.T)
    torch.testing.assert_close(modq.matmul(y, qweight, transpose=True), y @ whole)


@pytest.mark.parametrize("order", ORDERS[2:4], ids=str)
@pytest.mark.parametrize("transpose", [False, True])
def test_gradients_are_those_of_the_product(order, transpose):
    qweight = quantized(gaussian(7, 12), hessian(12), bits=3, group_size=5, symmetric=False, **order)
    x = gaussian(2, 7 if transpose else 12, seed=2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: modq.matmul(x, qweight, transpose), x)


def test_the_bits_a_weight_are_those_of_the_format():
    moments = hessian(1024)
    for bits, symmetric, expected in [
        (4, True, 4.125),
        (3, False, 3.148),
        (2, True, 2.125),
        (2, False, 2.141),
    ]:
        qweight = quantized(gaussian(64, 1024), moments, bits=bits, symmetric=symmetric)
        assert qweight.bits_per_weight == pytest.approx(expected, abs=1e-3)


def test_a_group_size_of_minus_one_is_the_whole_row():
    assert Options(group_size=-1) == Options(group_size=None)
    assert quantized(gaussian(8, 60), hessian(60), group_size=-1).tensors["scales"].shape == (8, 1)


def test_dead_inputs_get_no_weight_and_harm_no_other():
    weight, moments = gaussian(16, 64), hessian(64)
    dead = [3, 17, 63]
    moments[dead] = 0
    moments[:, dead] = 0
    alive = [i for i in range(64) if i not in dead]
    found = modq.dequantize(quantized(weight, moments, group_size=None))
    assert not found[:, dead].any()
    expected = modq.dequantize(quantized(weight[:, alive], moments[alive][:, alive], group_size=None))
    assert torch.equal(found[:, alive], expected)
    assert not modq.dequantize(quantized(weight, torch.zeros(64, 64))).any()


def test_the_scale_of_the_hessian_does_not_matter():
    weight, moments = gaussian(16, 64), hessian(64)
    moments[5] = moments[:, 5] = 0
    plain, scaled = quantized(weight, moments), quantized(weight, moments * 2**-20)
    assert torch.equal(plain.tensors["codes"], scaled.tensors["codes"])


def test_a_group_of_zeros_stays_so():
    weight = gaussian(8, 96)
    weight[:, 32:64] = 0
    weight[3] = 0
    found = modq.dequantize(quantized(weight, torch.eye(96), group_size=32, symmetric=False))
    assert not found[:, 32:64].any()
    assert not found[3].any()


def test_weights_of_extreme_size_are_quantized_or_refused_by_name():
    moments = hessian(64)
    for size in (1e-6, 1e30):
        weight = gaussian(8, 64) * size
        found = modq.dequantize(quantized(weight, moments, bits=8, scale_dtype="float32"))
        assert (found - weight).norm() <= 0.1 * weight.norm()
    with pytest.raises(WeightError, match="needs a scale beyond float16; use scale_dtype='float32'"):
        quantized(gaussian(8, 64) * 1e30, moments)


def test_damping_grows_until_the_hessian_can_be_factorized(caplog):
    weight = gaussian(8, 64)
    moments = hessian(64) - 0.05 * hessian(64).diagonal().mean() * torch.eye(64)
    moments.diagonal().abs_()
    quantized(weight, moments)
    assert "not positive definite with damping=0.01; used 0.0" in caplog.text
    caplog.clear()
    few = hessian(64, rows=10)  # as singular as a Hessian of too few tokens
    found = modq.dequantize(quantized(weight, few))
    assert output_error(found, weight, few) < 0.01
    assert not caplog.text


def test_a_hessian_that_is_none_is_refused_in_one_line():
    weight, moments = gaussian(8, 64), hessian(64)
    indefinite = moments.clone()
    indefinite[0, 1] = indefinite[1, 0] = 1e4
    negative, broken = -moments, moments.clone()
    broken[4, 5] = torch.nan
    for wrong, said in [
        (indefinite, r"not positive definite, even with damping=0.1; calibrate on more data"),
        (negative, r"on its diagonal, expected a mean of squares"),
        (broken, r"the Hessian has NaN or infinite values"),
        (moments[:60, :60], r"the Hessian has shape \(60, 60\), expected \(64, 64\)"),
    ]:
        with pytest.raises(WeightError, match=said) as caught:
            quantized(weight, wrong, max_damping=0.1)
        assert "\n" not in str(caught.value)


def test_no_hessian_is_refused_in_one_line():
    with pytest.raises(WeightError, match="needs calibration"):
        modq.quantize(gaussian(8, 64), "optq")
    with pytest.raises(WeightError, match="a Hessian"):
        modq.quantize(gaussian(8, 64), "optq", Calibration(inputs=gaussian(9, 64)))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"bits": 5}, "bits=5, expected 2, 3, 4 or 8"),
        ({"group_size": 0}, "group_size=0, expected at least 1"),
        ({"group_size": -2}, "group_size=-2"),
        ({"act_order": "desc"}, "act_order='desc', expected 'none', 'full' or 'group'"),
        ({"scale_dtype": "int8"}, "scale_dtype='int8', expected 'float16'"),
        ({"damping": 0.0}, "damping=0.0, max_damping=1.0, expected 0 < damping <= max_damping"),
        ({"damping": 2.0}, "damping=2.0"),
    ],
)
def test_options_that_do_not_exist_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        Options(**given)


def test_info_and_options_import_no_torch():
    code = "import sys, modq_optq, modq_optq.options; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""The quipsharp backend: its options, its hooks, and how much it loses."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import modq
from modq.errors import ModqError, OptionError, ShapeError, WeightError
from modq.kernels.dispatch import DECODED_ELEMENTS
from modq.materialize import BLOCK_ELEMENTS
from modq.spec import Calibration, QuantizedWeight
from modq_quipsharp import INFO
from modq_quipsharp.options import Options

KINDS: list[dict[str, Any]] = [
    {"bits": 2},
    {"bits": 3},
    {"bits": 4, "rescale": True},
    {"bits": 2, "codebook": "uniform", "rotation": "kronecker"},
    {"bits": 3, "codebook": "uniform", "rotation": "kronecker", "rescale": True},
    {"bits": 4, "codebook": "uniform"},
    {"bits": 2, "rotation": "kronecker", "seed": 5},
]
every_kind = pytest.mark.parametrize("options", KINDS, ids=str)
SHAPES = [(64, 96), (63, 40), (7, 8), (1, 72), (38, 88)]
"""Sizes with a Hadamard matrix, sizes without, and primes; in_features divides by 8."""


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def calibration(n: int) -> Calibration:
    """Return the second moments of inputs with a few strong directions and a dead one."""
    x = gaussian(300, n // 4, seed=1) @ gaussian(n // 4, n, seed=2) + gaussian(300, n, seed=3)
    x[:, 0] = 0
    return Calibration(x.T @ x / len(x), len(x))


def loss(weight: Tensor, qweight: QuantizedWeight, hessian: Tensor) -> float:
    error = weight - modq.dequantize(qweight)
    return float((((error @ hessian) * error).sum() / ((weight @ hessian) * weight).sum()).sqrt())


@every_kind
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_weight_becomes_the_tensors_described(options: dict[str, Any], shape: tuple[int, int]) -> None:
    """`modq.quantize` compares the tensors with `describe`."""
    weight = gaussian(*shape)
    before, state = weight.clone(), torch.get_rng_state()
    for data in (None, calibration(shape[1])):
        one, other = (modq.quantize(weight, "quipsharp", data, **options, tune_iters=1) for _ in range(2))
        assert json.loads(json.dumps(one.meta)) == one.meta
        assert all(torch.equal(other.tensors[name], tensor) for name, tensor in one.tensors.items())
        assert all(tensor.is_contiguous() for tensor in one.tensors.values())
    assert torch.equal(weight, before)
    assert torch.equal(torch.get_rng_state(), state)


@every_kind
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_products_are_as_close_as_the_dense_ones(
    options: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    qweight = modq.quantize(gaussian(*shape), "quipsharp", **options)
    exact = modq.dequantize(qweight, torch.float64)
    rounded = modq.dequantize(qweight, dtype)
    for transpose, depth in ((False, shape[1]), (True, shape[0])):
        x = gaussian(2, 33, depth, seed=4).to(dtype)
        expected = x.double() @ (exact if transpose else exact.T)
        dense = x @ (rounded if transpose else rounded.T)
        found = modq.matmul(x, qweight, transpose)
        assert (found.shape, found.dtype) == (dense.shape, dtype)
        # A sum of one or seven terms is exact but for one rounding; nothing between rotations can match that.
        floor = torch.finfo(dtype).eps / 2 if depth > 8 else 4 * torch.finfo(dtype).eps
        allowed = 2 * (dense.double() - expected).norm() + floor * expected.norm()
        assert (found.double() - expected).norm() <= allowed


@every_kind
def test_slices_are_those_of_the_whole(options: dict[str, Any]) -> None:
    qweight = modq.quantize(gaussian(63, 40), "quipsharp", **options)
    whole = modq.dequantize(qweight, torch.float64)
    cuts = (
        (slice(5, 9), slice(3, 39)),
        (slice(0, 63), slice(7, 8)),
        (slice(62, 63), slice(0, 40)),
        (slice(4, 4), slice(0, 40)),
    )
    for rows, columns in cuts:
        found = modq.api.dequantize_slice(qweight, torch.float64, rows, columns)
        torch.testing.assert_close(found, whole[rows, columns])
        for dtype in (torch.float32, torch.bfloat16):
            low = modq.api.dequantize_slice(qweight, dtype, rows, columns)
            assert low.dtype == dtype
            torch.testing.assert_close(low.double(), found, rtol=torch.finfo(dtype).eps, atol=1e-6)


@every_kind
def test_the_gradient_is_that_of_the_product(options: dict[str, Any]) -> None:
    qweight = modq.quantize(gaussian(12, 24), "quipsharp", **options)
    x = gaussian(1, 24).double().requires_grad_()
    y = gaussian(1, 12).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: modq.matmul(x, qweight), x)
    assert torch.autograd.gradcheck(lambda y: modq.matmul(y, qweight, transpose=True), y)
    assert torch.autograd.gradgradcheck(lambda x: modq.matmul(x, qweight), x)


@every_kind
def test_autocast_changes_the_dtype_of_inputs_and_nothing_inside(options: dict[str, Any]) -> None:
    weight, x, data = gaussian(64, 96), gaussian(5, 96), calibration(96)
    outside = modq.quantize(weight, "quipsharp", data, **options, tune_iters=1)
    expected = modq.matmul(x.bfloat16(), outside), modq.dequantize(outside)
    with torch.autocast("cpu", torch.bfloat16):
        inside = modq.quantize(weight, "quipsharp", data, **options, tune_iters=1)
        found = modq.matmul(x, outside), modq.dequantize(outside)
    assert torch.equal(inside.tensors["codes"], outside.tensors["codes"])
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("options", [{"bits": 2}, {"bits": 3}, {"bits": 4}, {"codebook": "uniform"}], ids=str)
def test_a_few_large_weights_cost_no_more_than_gaussian_ones(options: dict[str, Any]) -> None:
    """What Hadamard rotations are for: the declared error holds for any weight, not only a Gaussian one."""
    weight = gaussian(128, 192) * 0.02
    weight[3, 5], weight[7], weight[:, 11] = 3.0, 0.3, -0.2
    found = modq.dequantize(modq.quantize(weight, "quipsharp", **options))
    declared = INFO.max_relative_error[options.get("bits", 2)]
    assert (found - weight).norm() <= declared * (1.15 if "codebook" in options else 1.05) * weight.norm()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_declared_error_holds_and_is_not_slack(bits: int) -> None:
    weight = gaussian(256, 576)
    found = modq.dequantize(modq.quantize(weight, "quipsharp", bits=bits))
    error = float((found - weight).norm() / weight.norm())
    assert error <= INFO.max_relative_error[bits] <= 1.1 * error


@every_kind
def test_calibration_is_worth_far_more_than_plain_rounding(options: dict[str, Any]) -> None:
    weight, data = gaussian(48, 96), calibration(96)
    plain, fed = (modq.quantize(weight, "quipsharp", c, **options) for c in (None, data))
    untuned = modq.quantize(weight, "quipsharp", data, **options, tune_iters=0)
    assert loss(weight, untuned, data.hessian) < 0.75 * loss(weight, plain, data.hessian)
    assert loss(weight, fed, data.hessian) < 0.97 * loss(weight, untuned, data.hessian)


def test_rescaling_helps_where_inputs_differ_in_size() -> None:
    weight, data = gaussian(48, 96), calibration(96)
    sizes = torch.logspace(-1.5, 1.5, 96)
    data = replace(data, hessian=data.hessian * sizes * sizes[:, None])
    plain, rescaled = (modq.quantize(weight, "quipsharp", data, rescale=r) for r in (False, True))
    assert loss(weight, rescaled, data.hessian) < 0.9 * loss(weight, plain, data.hessian)


@pytest.mark.parametrize("factor", [torch.finfo(torch.float32).tiny, 1e-25, 1e25])
@pytest.mark.parametrize("options", [{"bits": 2}, {"bits": 4, "codebook": "uniform"}], ids=str)
def test_the_extremes_of_float_are_quantized(options: dict[str, Any], factor: float) -> None:
    weight = gaussian(16, 64) * factor
    found = modq.dequantize(modq.quantize(weight, "quipsharp", **options)).double()
    assert (found - weight.double()).norm() <= 0.35 * weight.double().norm()
    zeros = modq.quantize(torch.zeros(16, 64), "quipsharp", calibration(64), **options)
    assert not modq.dequantize(zeros).any()
    with pytest.raises(WeightError, match="'scale' would hold NaN or Inf"):
        modq.quantize(gaussian(16, 64).double() * 1e300, "quipsharp", **options)


def test_seeds_differ_and_the_scale_can_be_chosen() -> None:
    weight = gaussian(64, 96)
    chosen = [
        modq.quantize(weight, "quipsharp", **o) for o in ({}, {"seed": 1}, {"scale": 0.9}, {"scale": 1.03})
    ]
    codes = [qweight.tensors["codes"] for qweight in chosen]
    assert torch.equal(codes[0], codes[3])
    assert all((codes[0] != other).float().mean() > 0.2 for other in codes[1:3])
    assert chosen[0].meta == chosen[1].meta  # they share a compiled graph


@pytest.mark.parametrize("transpose", [False, True], ids=["forward", "transpose"])
@pytest.mark.parametrize("options", [{"bits": 2}, {"bits": 3}, {"bits": 4}, KINDS[3]], ids=str)
def test_a_product_holds_one_block_of_the_matrix(options: dict[str, Any], transpose: bool) -> None:
    """By the allocator's own account of live bytes; the whole matrix in float32 would be 64 MiB."""
    shape = (4096, 4096)
    specs = modq.api.describe_weight(shape, "quipsharp", modq.options.build_options("quipsharp", options))
    tensors = {name: torch.ones(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
    meta = modq.quantize(gaussian(8, 8), "quipsharp", **options).meta
    qweight, x = QuantizedWeight("quipsharp", 1, shape, tensors, meta), torch.ones(8, 4096)
    modq.matmul(x, qweight, transpose)  # makes the tables
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        y = modq.matmul(x, qweight, transpose)
    live = peak = 0
    for event in profiled.profiler.kineto_results.events():
        live += event.nbytes() if event.name() == "[memory]" else 0
        peak = max(peak, live)
    # a block: 4 bytes a weight for its value, in plain torch also for its codes; x and y while rotated
    assert peak <= max(BLOCK_ELEMENTS * 8, DECODED_ELEMENTS * 4) + 8 * y.nbytes


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"bits": 5}, "bits=5, expected 2 or 3 or 4"),
        ({"codebook": "e8"}, "codebook='e8', expected 'e8p' or 'uniform'"),
        ({"rotation": "dct"}, "rotation='dct', expected 'hadamard' or 'kronecker'"),
        ({"scale": 0.0}, "scale=0.0, expected a number above 0"),
        ({"residual_scale": 3.0}, "residual_scale is for codebook 'e8p' at 3 or 4 bits"),
        ({"residual_scale": -1.0, "bits": 3}, "residual_scale=-1.0, expected a number above 0"),
        ({"damping": 0.0}, "damping=0.0, expected a number above 0"),
        ({"tune_iters": -1}, "tune_iters=-1, expected at least 0"),
        ({"part_of": (8, 8, 8)}, "expected .rows of the whole, first row."),
    ],
)
def test_options_that_do_not_exist_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Options(**given)


@pytest.mark.parametrize(
    ("shape", "options", "data", "error", "said"),
    [
        ((8, 12), {}, None, ShapeError, "needs multiples of .1, 8."),
        ((8, 16), {}, Calibration(torch.eye(8)), WeightError, r"\(8, 8\), expected \(16, 16\)"),
        ((8, 16), {}, Calibration(torch.full((16, 16), torch.nan)), WeightError, "Hessian has NaN"),
        ((8, 16), {}, Calibration(-torch.eye(16)), WeightError, "NaN, infinite or negative"),
        (
            (8, 16),
            {},
            Calibration(2 * torch.ones(16, 16) - torch.eye(16)),
            WeightError,
            "not positive definite",
        ),
        ((8, 16), {"part_of": (16, 9)}, None, OptionError, "has 16 rows, and the layer's are rows 9 to 17"),
        ((8, 2 * 8 * 4099), {"rotation": "kronecker"}, None, ShapeError, "use rotation 'hadamard'"),
    ],
)
def test_what_cannot_be_quantized_is_refused(
    shape: tuple[int, int],
    options: dict[str, Any],
    data: Calibration | None,
    error: type[ModqError],
    said: str,
) -> None:
    with pytest.raises(error, match=said):
        modq.quantize(torch.ones(shape), "quipsharp", data, **options)


def test_inputs_that_are_always_zero_mean_no_calibration() -> None:
    weight = gaussian(8, 16)
    plain, dead = (modq.quantize(weight, "quipsharp", c) for c in (None, Calibration(torch.zeros(16, 16))))
    assert torch.equal(plain.tensors["codes"], dead.tensors["codes"])


def test_info_and_options_import_no_torch() -> None:
    code = "import sys, modq_quipsharp, modq_quipsharp.options; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

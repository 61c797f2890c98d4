"""The nf4 backend: its options, its constants, its hooks, and how much it loses."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
from itertools import product

import pytest
import torch
from torch import Tensor

import modq
from modq.errors import WeightError
from modq.spec import QuantizedWeight
from modq_nf4 import INFO, tables
from modq_nf4.options import BLOCK_SIZES, Options
from modq_nf4.quantizer import NF4

ALL = slice(None)
nf4 = NF4()
every_kind = pytest.mark.parametrize(
    "options",
    [
        Options(quant_type, 64, double_quant)
        for quant_type, double_quant in product(("nf4", "fp4"), (False, True))
    ],
    ids=str,
)


def gaussian(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dense(qweight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    return nf4.dequantize(qweight, dtype, ALL, ALL)


def loss(options: Options) -> float:
    weight = gaussian(512, 1024)
    return float((dense(nf4.quantize(weight, options)) - weight).norm() / weight.norm())


def test_the_dynamic_map_is_the_one_of_bitsandbytes() -> None:
    numbers = tables.dynamic_map()
    assert len(numbers) == 256
    assert list(numbers) == sorted(numbers)
    assert hashlib.sha256(struct.pack("<256f", *numbers)).hexdigest().startswith("e732639a65f497b4")
    assert numbers[0] == pytest.approx(-0.99296874)
    assert numbers[-1] == 1.0
    assert min(abs(number) for number in numbers if number) == pytest.approx(5.5e-7)


def test_the_code_tables_have_sixteen_numbers_up_to_one() -> None:
    for table in tables.CODES.values():
        assert len(table) == 16
        assert max(map(abs, table)) == 1.0
    assert list(tables.NF4) == sorted(tables.NF4)
    assert tables.FP4[:8] == (0, 0.0625 / 12, 8 / 12, 1, 4 / 12, 6 / 12, 2 / 12, 3 / 12)
    assert tables.FP4[8:] == tuple(-number for number in tables.FP4[:8])


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 128), (63, 60), (1, 100), (100, 1), (1, 1), (17, 63)])
def test_a_weight_becomes_the_tensors_described_and_comes_back_close(
    options: Options, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    weight = gaussian(*shape, dtype=dtype)
    before, state = weight.clone(), torch.get_rng_state()
    qweight = nf4.quantize(weight, options)
    assert {name: (spec.shape, spec.dtype) for name, spec in nf4.describe(shape, options).items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in qweight.tensors.items()
    }
    assert json.loads(json.dumps(qweight.meta)) == qweight.meta
    assert qweight.shape == shape
    # every weight is within half the widest gap of the table (and what double quantization does to the scale)
    largest_gap = {"nf4": 0.3038, "fp4": 0.3334}[options.quant_type]
    assert (dense(qweight) - weight).abs().max() <= (largest_gap / 2 + 0.05) * weight.abs().max()
    assert torch.equal(weight, before)
    assert torch.equal(torch.get_rng_state(), state)
    again = nf4.quantize(weight, options)
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in qweight.tensors.items())


@every_kind
def test_slices_equal_the_whole_and_products_use_the_matrix(options: Options) -> None:
    qweight = nf4.quantize(gaussian(63, 60), options)
    whole = dense(qweight)
    assert torch.equal(nf4.dequantize(qweight, torch.float32, slice(5, 40), slice(7, 59)), whole[5:40, 7:59])
    x, y = gaussian(2, 60, seed=1), gaussian(2, 63, seed=2)
    torch.testing.assert_close(modq.matmul(x, qweight), x @ whole.T)
    torch.testing.assert_close(modq.matmul(y, qweight, transpose=True), y @ whole)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_declared_error_holds_and_is_not_slack(quant_type: str) -> None:
    declared = INFO.max_relative_error[4]
    assert loss(Options(quant_type)) <= declared
    assert declared <= 1.5 * loss(Options())  # what the default options lose


def test_larger_blocks_lose_more_and_double_quantization_next_to_nothing() -> None:
    losses = [loss(Options(block_size=size, double_quant=False)) for size in BLOCK_SIZES]
    assert losses == sorted(losses)
    assert loss(Options()) <= 1.01 * loss(Options(double_quant=False))


def test_double_quantization_takes_0_127_bits_a_weight_for_scales() -> None:
    weight = gaussian(512, 1024)
    assert nf4.quantize(weight, Options()).bits_per_weight == pytest.approx(4.127, abs=1e-4)
    assert nf4.quantize(weight, Options(double_quant=False)).bits_per_weight == 4.5


@every_kind
def test_blocks_of_zeros_stay_zeros(options: Options) -> None:
    weight = gaussian(10, 64)
    weight[3:] = 0
    found = dense(nf4.quantize(weight, options))
    assert found.isfinite().all()
    assert not found[3:].any()
    assert not dense(nf4.quantize(torch.zeros(7, 9), options)).any()


@every_kind
def test_the_extremes_of_float_are_quantized(options: Options) -> None:
    for scale in (torch.finfo(torch.float32).tiny, 1e-30, 1e30):
        weight = gaussian(8, 64) * scale
        found = dense(nf4.quantize(weight, options)).double()
        assert (found - weight.double()).norm() <= 0.2 * weight.double().norm(), scale


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_that_is_not_finite_is_refused(value: float) -> None:
    weight = gaussian(8, 64)
    weight[3, 3] = value
    with pytest.raises(WeightError, match="finite"):
        nf4.quantize(weight, Options())


@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_every_power_of_two_from_32_to_4096_is_a_block_size(size: int) -> None:
    weight = gaussian(20, 300)
    assert loss(Options(block_size=size)) < 0.12
    assert dense(nf4.quantize(weight, Options(block_size=size))).shape == weight.shape


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"quant_type": "nf3"}, "quant_type='nf3', expected 'nf4' or 'fp4'"),
        ({"block_size": 48}, "block_size=48, expected a power of two from 32 to 4096"),
        ({"block_size": 16}, "block_size=16"),
        ({"block_size": 8192}, "block_size=8192"),
        ({"block_size": 0}, "block_size=0"),
    ],
)
def test_options_that_do_not_exist_are_refused(given: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Options(**given)


def test_info_and_options_import_no_torch() -> None:
    code = "import sys, modq_nf4, modq_nf4.options, modq_nf4.tables; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

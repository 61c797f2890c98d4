"""bitsandbytes as the witness: its tensors decode to the same bits, a weight becomes the same codes."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from modq.layouts import pack_bits
from modq.spec import QuantizedWeight
from modq_nf4 import tables
from modq_nf4.options import Options
from modq_nf4.quantizer import NF4

functional = pytest.importorskip(
    "bitsandbytes.functional", reason="bitsandbytes, the witness, is not installed"
)

ALL = slice(None)
SHAPES = [(96, 128), (63, 60), (17, 64), (63, 61), (300, 576), (1, 40), (128, 1)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_kind = pytest.mark.parametrize(
    "options",
    [Options(*kind) for kind in product(("nf4", "fp4"), (32, 64, 128, 512, 4096), (False, True))],
    ids=str,
)


@pytest.fixture(autouse=True)
def _no_compiling():  # bitsandbytes compiles its fallback anew for every shape, which takes seconds
    with torch.compiler.set_stance("force_eager"):
        yield


def theirs(weight: Tensor, options: Options) -> tuple[Tensor, functional.QuantState]:
    return functional.quantize_4bit(
        weight,
        blocksize=options.block_size,
        quant_type=options.quant_type,
        compress_statistics=options.double_quant,
    )


def codes_of(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    """Unpack bitsandbytes' flat bytes, the first of two weights in the high half: (out, in) uint8."""
    flat = packed.flatten()
    return torch.stack((flat >> 4, flat & 15), dim=1).flatten()[: shape[0] * shape[1]].view(shape)


def converted(packed: Tensor, state: functional.QuantState, options: Options) -> QuantizedWeight:
    shape = tuple(state.shape)
    tensors = {"codes": pack_bits(codes_of(packed, shape), 4)}
    if options.double_quant:
        tensors["scale_codes"] = state.absmax
        tensors["scale_scales"] = state.state2.absmax
        tensors["scale_offset"] = state.offset.view(1)
    else:
        tensors["scales"] = state.absmax
    meta = {
        "quant_type": options.quant_type,
        "block_size": options.block_size,
        "double_quant": options.double_quant,
    }
    return QuantizedWeight("nf4", 1, shape, tensors, meta)


def weights() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator).to(dtype) * 0.02 for shape, dtype in product(SHAPES, DTYPES)
    ]


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_tables_are_those_of_bitsandbytes(quant_type: str) -> None:
    assert torch.equal(
        torch.tensor(tables.CODES[quant_type]), functional.get_4bit_type(quant_type, device="cpu")
    )
    assert torch.equal(torch.tensor(tables.dynamic_map()), functional.create_dynamic_map())


@every_kind
def test_tensors_of_bitsandbytes_decode_to_the_same_bits(options: Options) -> None:
    for weight in weights():
        packed, state = theirs(weight, options)
        expected = functional.dequantize_4bit(packed, state)
        found = NF4().dequantize(converted(packed, state, options), weight.dtype, ALL, ALL)
        if not _by_their_kernel(weight, options):
            # their fallback gives fp4's code 8 as +0, their kernel and we as -0
            expected, found = expected + 0.0, found + 0.0
        assert torch.equal(bits_of(found), bits_of(expected)), (weight.shape, weight.dtype)


def _by_their_kernel(weight: Tensor, options: Options) -> bool:
    """Whether bitsandbytes decodes this by its compiled kernel on a CPU, or by a fallback in torch."""
    return weight.shape[1] % 2 == 0 and options.block_size < 2048


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


@every_kind
def test_the_same_weight_becomes_the_same_codes_and_absmax(options: Options) -> None:
    for weight in weights():
        packed, state = theirs(weight, options)
        ours = NF4().quantize(weight, options)
        name = (weight.shape, weight.dtype)
        assert torch.equal(ours.tensors["codes"], converted(packed, state, options).tensors["codes"]), name
        if options.double_quant:
            assert torch.equal(ours.tensors["scale_offset"], state.offset.view(1)), name
            assert torch.equal(ours.tensors["scale_scales"], state.state2.absmax), name
        else:
            assert torch.equal(ours.tensors["scales"], state.absmax), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_nested_scale_codes_agree_but_for_one_in_a_thousand_off_by_one(dtype: torch.dtype) -> None:
    weight = torch.randn(2048, 1024, generator=torch.Generator().manual_seed(1)).to(dtype)
    _, state = theirs(weight, Options())
    ours = NF4().quantize(weight, Options()).tensors["scale_codes"]
    steps = (ours.int() - state.absmax.int()).abs()
    assert steps.max() <= 1
    assert (steps == 0).float().mean() >= 0.999


def test_zeros_become_the_same_codes() -> None:
    weight = torch.zeros(8, 64)
    weight[0, 0] = 1
    for quant_type in ("nf4", "fp4"):
        options = Options(quant_type, double_quant=False)
        packed, state = theirs(weight, options)
        assert torch.equal(
            NF4().quantize(weight, options).tensors["codes"],
            converted(packed, state, options).tensors["codes"],
        )

"""GPTQ checkpoints: words and zeros as the format has them, both ways, and what does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import modq
from modq.errors import CheckpointError, OptionError, ShapeError
from modq.hf.foreign import find_format
from modq.layouts import pack_bits
from modq.registry import load
from modq.spec import Calibration, QuantizedWeight
from modq_optq import INFO
from modq_optq.gptq import make_config, read_linear, write_linear
from modq_optq.options import BITS, Options

VERSIONS = ["gptq", "gptq_v2"]


def words(values: list[int], bits: int) -> list[int]:
    """Pack values into signed words of 32 bits, by Python's integers."""
    stream = sum(value << bits * k for k, value in enumerate(values))
    unsigned = [stream >> 32 * i & 0xFFFFFFFF for i in range(len(values) * bits // 32)]
    return [word - (1 << 32) if word >> 31 else word for word in unsigned]


def packed(codes: Tensor, zeros: Tensor, scales: Tensor, bits: int, offset: int) -> dict[str, Tensor]:
    """Pack codes (in, out), zeros and scales (groups, out) as the format says, without modq."""
    fields = (zeros - offset) % 2**bits
    return {
        "qweight": torch.tensor([words(column, bits) for column in codes.T.tolist()], dtype=torch.int32).T,
        "qzeros": torch.tensor([words(row, bits) for row in fields.tolist()], dtype=torch.int32),
        "scales": scales,
    }


def stored(bits: int, offset: int, g_idx: Tensor | None = None) -> tuple[dict[str, Tensor], Tensor]:
    """Return a random linear of 96 inputs in groups of 40 and 32 outputs, and its weight."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (96, 32), generator=generator)
    zeros = torch.randint(0, 2**bits, (3, 32), generator=generator)
    zeros[0, :3] = 0
    scales = torch.rand(3, 32, generator=generator).half()
    tensors = packed(codes, zeros, scales, bits, offset)
    groups = torch.arange(96) // 40 if g_idx is None else g_idx
    if g_idx is not None:
        tensors["g_idx"] = g_idx.int()
    return tensors, (scales[groups].float() * (codes - zeros[groups])).T


def config(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 40, "sym": False, "desc_act": False, **changes}


def scattered() -> Tensor:
    """Return the group of each of 96 inputs, as act-order leaves them."""
    order = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    groups = torch.empty(96, dtype=torch.long)
    groups[order] = torch.arange(96) // 40
    return groups


def quantized(shape: tuple[int, int], **options: Any) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(*shape, generator=generator), torch.randn(400, shape[1], generator=generator)
    return modq.quantize(weight, "optq", Calibration(hessian=x.T @ x), **options)


@pytest.mark.parametrize(
    ("bits", "values", "expected"),
    [
        (4, range(8), [0x76543210]),
        (2, [k % 4 for k in range(16)], [0xE4E4E4E4]),
        (3, [k % 8 for k in range(32)], [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),
    ],
)
def test_codes_are_packed_into_the_words_of_the_format(bits, values, expected):
    values = list(values) * (32 // len(values))
    qweight = quantized((32, 32), bits=bits, group_size=None)
    codes = torch.tensor(values, dtype=torch.uint8).expand(32, 32)
    tensors = {**qweight.tensors, "codes": pack_bits(codes, bits)}
    found = write_linear(QuantizedWeight("optq", 1, (32, 32), tensors, qweight.meta), "gptq")["qweight"]
    assert [word & 0xFFFFFFFF for word in found[:, 5].tolist()] == expected * (bits // len(expected))
    assert words(values, bits) == found[:, 5].tolist()


@pytest.mark.parametrize(
    "g_idx", [None, torch.arange(96) // 40, scattered()], ids=["no", "regular", "sorted"]
)
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("bits", BITS)
def test_a_linear_is_read_as_the_format_says(bits, version, g_idx):
    tensors, expected = stored(bits, offset=int(version == "gptq"), g_idx=g_idx)
    layer = read_linear(tensors, config(bits=bits), version)
    assert torch.equal(modq.dequantize(layer.qweight), expected)
    described = load("optq").describe(shape=(32, 96), options=layer.options)
    assert {n: (s.shape, s.dtype) for n, s in described.items()} == {
        n: (tuple(t.shape), t.dtype) for n, t in layer.qweight.tensors.items()
    }
    written = write_linear(layer.qweight, version)
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("bits", BITS)
def test_a_zero_of_minus_one_is_read_as_asked(bits):
    tensors, wrapped = stored(bits, offset=1)
    layer = read_linear(tensors, config(bits=bits, zero_wrap=False), "gptq")
    # Fields of ones stand for zeros of 2^bits here, not for 0: those weights are lower by as many steps.
    steps = tensors["scales"].T.float()[:, torch.arange(96) // 40] * 2**bits
    zeros = modq.dequantize(read_linear(tensors, config(bits=bits), "gptq").qweight) == wrapped
    assert zeros.all()
    lowered = modq.dequantize(layer.qweight) != wrapped
    assert lowered[:3, :40].all()
    expected = torch.where(lowered, wrapped - steps, wrapped)
    torch.testing.assert_close(modq.dequantize(layer.qweight), expected, rtol=1e-6, atol=1e-6)
    written = write_linear(layer.qweight, "gptq")
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    with pytest.raises(OptionError, match=rf"holds no zero of {2**bits} in {bits} bits; write 'gptq'"):
        write_linear(layer.qweight, "gptq_v2")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4},
        {"bits": 3, "symmetric": False, "act_order": "full"},
        {"bits": 2, "group_size": None, "act_order": "full", "static_groups": True},
        {"bits": 8, "act_order": "full", "static_groups": True, "symmetric": False},
        {"bits": 3, "group_size": 40, "act_order": "none", "static_groups": True, "mse": True},
        {"bits": 4, "scale_dtype": "bfloat16", "symmetric": False, "damping": 0.1},
    ],
    ids=str,
)
def test_what_is_written_is_read_back_bit_for_bit(options, version):
    options = {"group_size": 32, **options}
    qweight = quantized((64, 96), **options)
    made = make_config({"a": Options(**options)}, version, [])
    layer = read_linear(write_linear(qweight, version), made, version)
    assert layer.options == Options(**options)
    assert layer.qweight.meta == qweight.meta
    assert layer.qweight.tensors.keys() == qweight.tensors.keys()
    assert all(torch.equal(layer.qweight.tensors[name], tensor) for name, tensor in qweight.tensors.items())


def test_symmetric_needs_no_zeros_and_is_believed_only_if_the_tensors_agree():
    tensors, expected = stored(4, offset=1)
    layer = read_linear(tensors, config(sym=True), "gptq")
    assert not layer.options.symmetric
    assert torch.equal(modq.dequantize(layer.qweight), expected)
    tensors["qzeros"].fill_(0x77777777)
    assert "zeros" not in read_linear(tensors, config(sym=True), "gptq").qweight.tensors
    assert "zeros" in read_linear(tensors, config(sym=False), "gptq").qweight.tensors


def test_overrides_say_what_differs_from_layer_to_layer():
    base, other = Options(group_size=32), Options(bits=8, group_size=64)
    made = make_config({"a.x": base, "a.y": base, "b": other, "lm_head": base}, "gptq", ["a.z", "a.w"])
    assert made["dynamic"] == {"-:^a\\.z$": {}, "-:^a\\.w$": {}, "+:^b$": {"bits": 8, "group_size": 64}}
    assert (made["bits"], made["group_size"], made["sym"], made["lm_head"]) == (4, 32, True, True)
    assert make_config({"a": base}, "gptq", ["lm_head"])["dynamic"] is None
    for options in (base, other):
        qweight = quantized((32, 64), bits=options.bits, group_size=options.group_size)
        layer = read_linear(write_linear(qweight, "gptq"), made, "gptq")
        assert layer.options == options


def test_formats_are_told_apart_by_what_the_config_says():
    def fitting(given: dict[str, Any]) -> str:
        backend, known = find_format(given)
        assert backend == "optq"
        return known.name

    assert fitting(config()) == "gptq"
    assert fitting(config(checkpoint_format="gptq")) == "gptq"
    assert fitting(config(checkpoint_format="gptq_v2")) == "gptq_v2"
    assert find_format(config(checkpoint_format="marlin")) is None
    assert {known.name for known in INFO.formats} == set(VERSIONS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"qzeros": None}, "a GPTQ linear lacks qzeros; is a shard missing"),
        ({"qweight": torch.zeros(12, 32, dtype=torch.int64)}, "qweight is torch.int64 of shape"),
        ({"qweight": torch.zeros(13, 31, dtype=torch.int32)}, "are no shapes of one linear"),
        ({"scales": torch.zeros(3, 32)}, "scales are torch.float32, expected torch.float16"),
        ({"scales": torch.zeros(2, 32).half()}, "are no shapes of one linear"),
        ({"g_idx": torch.zeros(96, dtype=torch.int32)}, "does not put 96 inputs into groups of 40"),
        ({"g_idx": torch.zeros(95, dtype=torch.int32)}, "config and tensors disagree"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, said):
    tensors, _ = stored(4, offset=1)
    tensors = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=said):
        read_linear(tensors, config(), "gptq")


@pytest.mark.parametrize("changes", [{"bits": 3}, {"group_size": 16}, {"group_size": -1}, {"bits": None}])
def test_a_config_that_says_otherwise_is_refused(changes):
    tensors, _ = stored(4, offset=1)
    with pytest.raises(
        CheckpointError, match="the tensors hold 4 bits and 3 groups of 96 inputs, quantization_co"
    ):
        read_linear(tensors, config(**changes), "gptq")


@pytest.mark.parametrize("shape", [(48, 64), (64, 48)])
def test_a_shape_that_does_not_fill_words_is_refused(shape):
    with pytest.raises(ShapeError, match="only multiples of 32; leave that layer dense"):
        write_linear(quantized(shape), "gptq")


def test_scales_that_the_format_does_not_hold_are_refused():
    with pytest.raises(
        OptionError, match=r"holds no scales of torch.float32; quantize with scale_dtype='float16'"
    ):
        write_linear(quantized((32, 32), scale_dtype="float32"), "gptq")

"""HQQ's files: the packings, one linear in and out, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from modq.errors import CheckpointError, OptionError, ShapeError
from modq_hqq.checkpoint import linear_tag, pack_rows, unpack_rows
from modq_hqq.options import Options
from modq_hqq.quantizer import HQQ

ALL = slice(None)
BITS = (8, 4, 3, 2, 1)
hqq = HQQ()


def gaussian(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def written(
    shape: tuple[int, int] = (16, 160), dtype: torch.dtype = torch.float16, **given: Any
) -> dict[str, Tensor]:
    qweight = hqq.quantize(gaussian(*shape), Options(**given))
    return hqq.export_layers({"": qweight}, dtype)


def config(**given: Any) -> dict[str, Any]:
    return hqq.export_config(["lm_head"], {"model.layers.0.mlp.up_proj": Options(**given)})


def text(tensor: Tensor) -> str:
    return bytes(tensor.tolist()).decode("ascii")


def test_words_of_3_bits_are_those_of_the_specification() -> None:
    words = pack_rows((torch.arange(20) % 8).to(torch.uint8)[:, None], 3)
    assert words.dtype == torch.int32
    assert words.flatten().tolist() == [0x2982982, 0xBBCBBCB]


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        (8, [7, 255], [7, 255]),
        (4, [1, 2, 3, 4], [0x13, 0x24]),
        (2, [0, 1, 2, 3], [0b00011011]),
        (1, [1, 0, 0, 0, 1, 1, 0, 1], [0b10001101]),
        (3, [1], [1 << 27]),
    ],
)
def test_a_word_holds_its_codes_from_the_high_bits_down(
    bits: int, codes: list[int], expected: list[int]
) -> None:
    assert pack_rows(torch.tensor(codes, dtype=torch.uint8)[:, None], bits).flatten().tolist() == expected


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [8, 40, 64, 72])
def test_packing_and_unpacking_are_inverse(bits: int, rows: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, 5), generator=torch.Generator().manual_seed(rows)).to(
        torch.uint8
    )
    assert torch.equal(unpack_rows(pack_rows(codes, bits), bits)[:rows], codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(16, 160), (64, 24)])  # groups inside rows, and over rows
def test_a_linear_comes_back_bit_for_bit(bits, axis, scale_dtype, shape) -> None:
    options = Options(bits, 32, axis, scale_dtype)
    qweight = hqq.quantize(gaussian(*shape), options)
    tensors = hqq.export_layers({"": qweight}, torch.float16)
    imported = hqq.import_layers(tensors, config(bits=bits, group_size=32, axis=axis))[""]
    assert imported.options == Options(bits, 32, axis, scale_dtype, round_zero=bits == 4)
    assert imported.qweight.shape == shape
    for name, tensor in qweight.tensors.items():
        assert torch.equal(imported.qweight.tensors[name], tensor), name


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("axis", [0, 1])
def test_what_is_written_means_what_hqq_means(bits: int, axis: int) -> None:
    """Decode by the rules of the format alone: unpack, subtract, multiply, reshape."""
    weight = gaussian(16, 160)
    qweight = hqq.quantize(weight, Options(bits, 32, axis, "float32"))
    tensors = hqq.export_layers({"": qweight}, torch.float32)
    words, per_word = tensors["W_q"].to(torch.int64), {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}[bits]
    rows = [words >> (per_word - 1 - k) * bits & 2**bits - 1 for k in range(per_word)]
    codes = torch.cat(rows)[: 32 if axis == 0 else 80]
    matrix = (codes - tensors["zero"]) * tensors["scale"]
    assert torch.equal(matrix.reshape(16, 160), hqq.dequantize(qweight, torch.float32, ALL, ALL))
    assert tensors["scale"].shape == ((80, 1) if axis == 1 else (1, 80))
    assert (
        text(tensors["packing"])
        == {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}[bits]
    )
    assert text(tensors["unpack_view_dtype"]) == ("torch.int32" if bits == 3 else "torch.uint8")
    assert text(tensors["compute_dtype"]) == "torch.float32"
    assert tensors["shape"].tolist() == [16, 160]
    numbers = {name: int(tensors[name]) for name in ("nbits", "group_size", "axis", "view_as_float")}
    assert numbers == {"nbits": bits, "group_size": 32, "axis": axis, "view_as_float": 0}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_codes_viewed_as_floats_are_read(bits: int, dtype: torch.dtype) -> None:
    tensors = written(bits=bits)
    viewed = {
        **tensors,
        "W_q": tensors["W_q"].view(dtype),
        "view_as_float": torch.tensor(1, dtype=torch.uint8),
    }
    plain, found = (hqq.import_layers(given, {})[""].qweight for given in (tensors, viewed))
    assert torch.equal(found.tensors["codes"], plain.tensors["codes"])


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"quant_method": "hqq"},
        config(),
        {"quant_config": {"self_attn.q_proj": config()["quant_config"], "mlp.up_proj": None}},
        {
            "quant_config": {
                "mlp.up_proj": {"weight_quant_params": {"nbits": 2, "group_size": 16, "axis": 0}},
                "mlp.down_proj": {"weight_quant_params": {"nbits": 4, "group_size": None}},
            }
        },
    ],
    ids=["none", "bare", "one for all", "by tag", "by tag, mixed"],
)
def test_both_forms_of_the_config_are_read(given: dict[str, Any]) -> None:
    assert hqq.import_layers(written(), given)[""].options.bits == 4


def test_a_whole_row_is_written_as_a_number_and_configured_as_none() -> None:
    assert int(written(group_size=None)["group_size"]) == 160
    assert int(written(group_size=0, axis=0)["group_size"]) == 16
    assert config(group_size=0)["quant_config"]["weight_quant_params"]["group_size"] is None
    assert hqq.import_layers(written(group_size=None), config(group_size=0))[""].options.group_size == 160


def test_the_config_names_linears_by_their_tags() -> None:
    layers = {f"model.layers.{i}.{name}": Options(3) for i in range(2) for name in ("mlp.up", "mlp.down")}
    made = hqq.export_config(["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"], layers)
    assert made["skip_modules"] == ["lm_head", "mlp.gate"]
    assert made["quant_method"] == "hqq"
    assert made["quant_config"]["weight_quant_params"]["round_zero"] is False
    layers |= {f"model.layers.{i}.mlp.up": Options(2, 16) for i in range(2)}
    made = hqq.export_config([], layers)["quant_config"]
    assert {tag: entry["weight_quant_params"]["nbits"] for tag, entry in made.items()} == {
        "mlp.up": 2,
        "mlp.down": 3,
    }
    assert linear_tag("model.decoder.layers.11.fc1") == "decoder.fc1"


def test_linears_of_one_tag_that_differ_are_refused() -> None:
    layers = {"model.layers.0.mlp.up": Options(3), "model.layers.1.mlp.up": Options(4)}
    with pytest.raises(OptionError, match=r"the linears 'mlp.up' differ, .* save the model as modq"):
        hqq.export_config([], layers)
    with pytest.raises(OptionError, match=r"the linears 'mlp.up' are quantized in part"):
        hqq.export_config(["model.layers.1.mlp.up"], {"model.layers.0.mlp.up": Options(3)})


def test_what_the_format_cannot_hold_is_refused() -> None:
    with pytest.raises(ShapeError, match="group_size=64 does not divide the weights of shape \\(5, 33\\)"):
        written((5, 33))
    with pytest.raises(ShapeError, match="packs 8 rows of groups into one at 1 bits, and the weight has 5"):
        written((5, 64), bits=1)


def replaced(**tensors: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda given: given.update(tensors)


def number(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("scale"), "lacks scale; is a shard missing"),
        (lambda t: [t.pop("axis"), t.pop("shape")], "lacks axis, shape"),
        (replaced(quant_zero=torch.tensor(1, dtype=torch.uint8)), r"zeros are quantized .*\(quant_zero\)"),
        (replaced(zero_q=torch.zeros(4)), r"zeros are quantized .*\(zero_q\)"),
        (lambda t: t.update(scale_q=t.pop("scale")), r"scales are quantized .*\(scale_q\)"),
        (lambda t: t.update(zero_scale=torch.stack((t.pop("zero"), t.pop("scale")))), r"\(zero_scale\)"),
        (replaced(packing=torch.tensor(list(b"__import__('os')"), dtype=torch.uint8)), 'packing="__import__'),
        (replaced(packing=torch.tensor([200, 1], dtype=torch.uint8)), "packing is no text in ASCII"),
        (replaced(packing=torch.tensor([4.5])), "packing is no text in ASCII"),
        (replaced(nbits=number(3)), "nbits=3 with packing='4bit_u8', expected 8 with 8bit_u8"),
        (replaced(nbits=number(5), packing=torch.tensor(list(b"8bit_u8"))), "nbits=5 with packing='8bit_u8'"),
        (replaced(nbits=torch.tensor(1.58)), "nbits is 1.58, expected one whole number"),
        (replaced(axis=number(2)), "axis=2, expected 1 or 0"),
        (replaced(axis=torch.tensor([1, 1])), r"axis is of shape \(2,\), expected one whole number"),
        (replaced(group_size=number(48)), "group_size=48 does not divide the weights of shape"),
        (replaced(group_size=number(32)), "scale holds 40 numbers, expected 80"),
        (replaced(group_size=number(-64)), "group_size=-64"),
        (replaced(shape=torch.tensor([16, 32])), "scale holds 40 numbers, expected 8"),
        (replaced(shape=torch.tensor([16])), r"shape is \[16\], expected \(out_features, in_features\)"),
        (replaced(channel_wise=torch.tensor(0, dtype=torch.uint8)), "channel_wise is false"),
        (replaced(scale=torch.zeros(40, 1, dtype=torch.float64)), "scale is torch.float64 and zero"),
        (
            lambda t: t.update(W_q=t["W_q"][:-1]),
            r"W_q is torch.uint8 of shape \(19, 64\), expected .*\(20, 64\)",
        ),
        (lambda t: t.update(W_q=t["W_q"].int()), "W_q is torch.int32 of shape"),
        (lambda t: t.update(W_q=t["W_q"].view(torch.float16)[:, 1:]), "W_q is torch.float16 of shape"),
    ],
)
def test_a_damaged_linear_is_one_line(change, said) -> None:
    tensors = written()
    change(tensors)
    with pytest.raises(CheckpointError, match=said) as caught:
        hqq.import_layers(tensors, {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        (
            {"nbits": 3, "group_size": 64, "axis": 1},
            "config and tensors disagree: the tensors have {'nbits': 4",
        ),
        ({"nbits": 4, "group_size": 64, "axis": 0}, "config and tensors disagree"),
        ({"nbits": 4, "group_size": 128}, "config and tensors disagree"),
    ],
)
def test_a_config_that_does_not_fit_the_tensors_is_refused(params: dict[str, int], said: str) -> None:
    for quant_config in ({"weight_quant_params": params}, {"mlp.up_proj": {"weight_quant_params": params}}):
        with pytest.raises(CheckpointError, match=said):
            hqq.import_layers(written(), {"quant_config": quant_config})


def test_a_config_of_quantized_zeros_is_believed_only_if_the_zeros_are_gone() -> None:
    announced = config()
    announced["quant_config"]["zero_quant_params"] = {"nbits": 8, "group_size": 128}
    assert hqq.import_layers(written(), announced)[""].options.bits == 4  # hqq ignores the setting since 0.2
    tensors = written()
    del tensors["zero"]
    with pytest.raises(CheckpointError, match=r"zeros are quantized or packed away \(zero_quant_params\)"):
        hqq.import_layers(tensors, announced)

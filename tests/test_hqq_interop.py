"""The hqq backend in whole models: quantize, save, reload, train, merge; and HQQ's own checkpoints.

The hqq package is a witness where it is installed; what needs it says so and is skipped elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import modq
from modq.cli import main
from modq.errors import CheckpointError, ShapeError
from modq.hf.foreign import save_as
from modq.model import quantized_layers
from modq_hqq.quantizer import HQQ

IDS = torch.arange(4, 20)[None]
LAYER = "model.layers.1.mlp.up_proj"
KINDS = list(product((8, 4, 3, 2, 1), (0, 1)))
"""(bits, axis)"""


def from_pretrained(architecture: str, folder: Path, config: modq.ModqConfig | None = None) -> Any:
    auto = AutoModelForSeq2SeqLM if architecture == "t5" else AutoModelForCausalLM
    return auto.from_pretrained(folder, **({} if config is None else {"quantization_config": config}))


def packed(model: Any) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": tensor.clone()
        for name, layer in quantized_layers(model)
        for key, tensor in layer.named_packed()
    }


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert expected
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


def with_lora(model: Any, **options: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", **options))


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {"bits": 4}),
        ("llama", {"bits": 3, "axis": 0, "group_size": 16}),
        ("opt", {"bits": 8, "group_size": None}),
        ("opt", {"bits": 2, "group_size": 40}),  # groups over rows
        ("bloom", {"bits": 2, "group_size": 16}),
        ("bloom", {"bits": 1, "axis": 0, "group_size": 24}),
        ("t5", {"bits": 3, "scale_dtype": "bfloat16"}),
        ("t5", {"bits": 4, "axis": 0}),
    ],
    ids=str,
)
def test_a_model_is_quantized_on_load_saved_reloaded_and_trained(architecture, options, tiny, tmp_path):
    model = from_pretrained(architecture, tiny(architecture), modq.ModqConfig("hqq", **options))
    model.save_pretrained(tmp_path)
    again = from_pretrained(architecture, tmp_path)
    assert_equal(packed(again), packed(model))
    inputs = {"input_ids": IDS, "labels": IDS}
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    trained = with_lora(again)
    optimizer = torch.optim.AdamW((p for p in trained.parameters() if p.requires_grad), lr=0.01)
    losses = []
    for _ in range(6):
        loss = trained(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert_equal(packed(again), {f"{_wrapped(name)}": tensor for name, tensor in packed(model).items()})


def _wrapped(name: str) -> str:
    module, _, tensor = name.rpartition(".")
    return f"{module}.base_layer.{tensor}"


@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 3, "axis": 0}], ids=str)
def test_an_adapter_merges_and_comes_off_bit_for_bit(options, tiny_llama):
    base = from_pretrained("llama", tiny_llama, modq.ModqConfig("hqq", **options))
    model = with_lora(base, init_lora_weights=False).eval()
    before, adapted = packed(model), model(IDS).logits
    layer = base.model.layers[1].mlp.down_proj
    wanted = layer.base_layer.dequantize() + layer.get_delta_weight("default")
    model.merge_adapter()
    merged = modq.dequantize(modq.quantize(wanted, "hqq", **options))
    torch.testing.assert_close(layer.base_layer.dequantize(), merged)
    assert not torch.equal(model(IDS).logits, adapted)
    model.unmerge_adapter()
    assert_equal(packed(model), before)
    assert torch.equal(model(IDS).logits, adapted)


def test_backends_mix_in_one_model(tiny_llama, tmp_path):
    mixed = modq.ModqConfig(
        "hqq", bits=3, layers={"down_proj": {"backend": "nf4"}, "q_proj": {"bits": 2, "axis": 0}}
    )
    model = from_pretrained("llama", tiny_llama, mixed)
    assert {layer.backend for _, layer in quantized_layers(model)} == {"hqq", "nf4"}
    model.save_pretrained(tmp_path)
    again = from_pretrained("llama", tmp_path)
    assert_equal(packed(again), packed(model))
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.fixture(scope="module")
def foreign(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`foreign("llama", bits=3)`: a model, and the folder of it in HQQ's format."""
    made: dict[str, tuple[Any, Path]] = {}

    def write(architecture: str = "llama", **options: Any) -> tuple[Any, Path]:
        key = f"{architecture} {options}"
        if key not in made:
            folder = tmp_path_factory.mktemp("hqq") / "out"
            model = from_pretrained(architecture, tiny(architecture), modq.ModqConfig("hqq", **options))
            save_as(model, folder, "hqq")
            made[key] = model, folder
        return made[key]

    return write


@pytest.mark.parametrize(("bits", "axis"), KINDS)
def test_a_checkpoint_of_hqq_becomes_a_base_with_the_same_bits(bits, axis, foreign, tmp_path):
    model, folder = foreign(bits=bits, axis=axis, group_size=32)
    read = from_pretrained("llama", folder)
    assert_equal(packed(read), packed(model))
    assert torch.equal(read(IDS).logits, model(IDS).logits)
    read.save_pretrained(tmp_path / "modq")  # from here on it is modq's own
    assert_equal(packed(from_pretrained("llama", tmp_path / "modq")), packed(model))
    assert {layer.options.bits for _, layer in quantized_layers(read)} == {bits}


@pytest.mark.parametrize("architecture", ["opt", "bloom", "gpt2", "t5"])
def test_other_architectures_come_in_too(architecture, foreign):
    model, folder = foreign(architecture, bits=3, group_size=32)
    assert_equal(packed(from_pretrained(architecture, folder)), packed(model))


def rewritten(
    folder: Path, target: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]
) -> Path:
    """Copy a checkpoint with its tensors and its quantization_config changed."""
    target.mkdir()
    tensors, config = (
        load_file(folder / "model.safetensors"),
        json.loads((folder / "config.json").read_text()),
    )
    change(tensors, config["quantization_config"])
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_each_kind_of_linear_may_have_a_setting_of_its_own(tiny_llama, tmp_path):
    kinds = {"up_proj": {"bits": 2, "axis": 0}, "q_proj": {"bits": 3}, "gate_proj": None}
    model = from_pretrained("llama", tiny_llama, modq.ModqConfig("hqq", group_size=32, layers=kinds))
    save_as(model, tmp_path / "out", "hqq")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    told = {tag: entry["weight_quant_params"] for tag, entry in config["quant_config"].items()}
    assert {tag: (params["nbits"], params["axis"]) for tag, params in told.items()} == {
        "self_attn.q_proj": (3, 1),
        **{f"self_attn.{p}_proj": (4, 1) for p in "kvo"},
        "mlp.up_proj": (2, 0),
        "mlp.down_proj": (4, 1),
    }
    assert sorted(config["skip_modules"]) == ["lm_head", "mlp.gate_proj"]
    read = from_pretrained("llama", tmp_path / "out")
    assert_equal(packed(read), packed(model))
    assert torch.equal(read(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [4, 3])
def test_codes_viewed_as_floats_are_not_rounded_on_their_way_in(bits, dtype, foreign, tmp_path):
    model, folder = foreign(bits=bits, group_size=32)

    def view(tensors, config):
        for name in tensors:
            if name.endswith(".W_q"):
                tensors[name] = tensors[name].view(dtype)
                tensors[f"{name.removesuffix('.W_q')}.view_as_float"] = torch.tensor(1, dtype=torch.uint8)

    folder = rewritten(folder, tmp_path / "viewed", view)
    for asked in (torch.float32, torch.bfloat16):
        assert_equal(packed(AutoModelForCausalLM.from_pretrained(folder, dtype=asked)), packed(model))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, c: t.pop(f"{LAYER}.zero"), "lacks zero; is a shard missing?"),
        (
            lambda t, c: t.update({f"{LAYER}.zero_q": t.pop(f"{LAYER}.zero")}),
            "are quantized or packed away (zero_q)",
        ),
        (lambda t, c: t.update({f"{LAYER}.shape": torch.tensor([64, 96])}), "the file's weight is (64, 96)"),
        (lambda t, c: t.update({f"{LAYER}.nbits": torch.tensor(3)}), "nbits=3 with packing='4bit_u8'"),
        (
            lambda t, c: c["quant_config"]["weight_quant_params"].update(axis=0),
            "config and tensors disagree",
        ),
    ],
    ids=["missing tensor", "quantized zeros", "other shape", "other bits", "other config"],
)
def test_a_damaged_checkpoint_is_one_line_that_names_the_layer(change, said, foreign, tmp_path):
    folder = rewritten(foreign(bits=4, group_size=32)[1], tmp_path / "bad", change)
    with pytest.raises(CheckpointError) as caught:
        from_pretrained("llama", folder)
    assert said in str(caught.value)
    assert str(caught.value).startswith("model.layers.")
    assert "\n" not in str(caught.value)


def test_the_command_writes_the_format(tiny_llama, tmp_path):
    out = tmp_path / "out"
    given = ["--backend", "hqq", "--bits", "3", "--group-size", "32", "--format", "hqq", "--json"]
    result = CliRunner().invoke(main, ["quantize", str(tiny_llama), str(out), *given])
    assert result.exit_code == 0, result.output
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "hqq"
    assert config["quant_config"]["weight_quant_params"]["nbits"] == 3
    assert {layer.options.bits for _, layer in quantized_layers(from_pretrained("llama", out))} == {3}


def test_a_group_that_the_format_cannot_hold_is_refused(tiny_llama, tmp_path):
    model = from_pretrained("llama", tiny_llama, modq.ModqConfig("hqq", group_size=40))
    with pytest.raises(ShapeError, match="group_size=40 does not divide the weights"):
        save_as(model, tmp_path / "out", "hqq")
    assert not (tmp_path / "out").exists()


# With the hqq package as the witness


@pytest.fixture
def theirs() -> Any:
    return pytest.importorskip("hqq.core.quantize", reason="hqq, the witness, is not installed")


def heavy_tailed(*shape: int) -> Tensor:
    """Student's t with 4 degrees of freedom."""
    generator = torch.Generator().manual_seed(0)
    chi = torch.randn(4, *shape, generator=generator).square().mean(0)
    return 0.02 * torch.randn(*shape, generator=generator) / chi.sqrt()


def their_linear(package: Any, weight: Tensor, dtype: torch.dtype, view: bool = False, **given: Any) -> Any:
    config = package.BaseQuantizeConfig(**given, view_as_float=view)
    return package.HQQLinear.from_weights(weight.clone(), None, config, compute_dtype=dtype, device="cpu")


@pytest.mark.parametrize("group_size", [64, 48, None])
def test_the_package_finds_the_same_numbers(group_size, theirs):
    weight = heavy_tailed(128, 192)
    for bits, axis in KINDS:
        layer = their_linear(theirs, weight, torch.float32, nbits=bits, group_size=group_size, axis=axis)
        options = {"bits": bits, "group_size": group_size, "axis": axis, "scale_dtype": "float32"}
        ours = modq.quantize(weight, "hqq", **options).tensors
        read = HQQ().import_layers(layer.state_dict(), {})[""].qweight.tensors
        torch.testing.assert_close(ours["scales"], read["scales"], rtol=1e-6, atol=0)
        shifts = (ours["zeros"] - read["zeros"]).abs()
        assert shifts.median() < 1e-5, options
        # a weight halfway between two codes goes either way and shifts the group that it is in
        assert (shifts > 1e-3).float().mean() < 0.05, options
        assert (ours["codes"] != read["codes"]).float().mean() < 2e-3, options


@pytest.mark.parametrize(
    ("dtype", "view"), [(torch.float32, False), (torch.float16, True), (torch.bfloat16, False)]
)
def test_linears_go_both_ways_with_the_same_weights(dtype, view, theirs):
    for bits, axis in KINDS:
        weight = heavy_tailed(128, 192)
        layer = their_linear(theirs, weight, dtype, view, nbits=bits, group_size=64, axis=axis)
        read = HQQ().import_layers(layer.state_dict(), {})[""].qweight
        expected, found = layer.dequantize(), modq.dequantize(read, torch.float32)
        if dtype == torch.float32:
            assert torch.equal(found, expected), (bits, axis)
        else:  # they subtract and multiply in 16 bits
            bound = 3 * torch.finfo(dtype).eps * 2**bits
            assert (found - expected).norm() < bound * found.norm(), (bits, axis)
        state = HQQ().export_layers({"": read}, dtype)
        assert state.keys() == layer.state_dict().keys()
        again = theirs.HQQLinear(None, None, compute_dtype=dtype, device="cpu", initialize=False)
        again.load_state_dict(state)
        assert torch.equal(again.dequantize(), expected), (bits, axis)


def test_a_model_that_the_package_wrote_is_a_base(theirs, tiny_llama, tmp_path):
    model = from_pretrained("llama", tiny_llama)
    config = theirs.BaseQuantizeConfig(nbits=3, group_size=32, axis=1)
    for name, linear in list(model.named_modules()):
        if isinstance(linear, torch.nn.Linear) and name != "lm_head":
            packed_linear = theirs.HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu")
            model.set_submodule(name, packed_linear)
    save_file(
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    written = json.loads((tiny_llama / "config.json").read_text())
    written["quantization_config"] = {
        "quant_method": "hqq",
        "quant_config": config,
        "skip_modules": ["lm_head"],
    }
    (tmp_path / "config.json").write_text(json.dumps(written))
    read = from_pretrained("llama", tmp_path)
    assert len(list(quantized_layers(read))) == 14
    assert (read(IDS).logits - model(IDS).logits).norm() <= 1e-5 * model(IDS).logits.norm()
    with_lora(read)(input_ids=IDS, labels=IDS).loss.backward()

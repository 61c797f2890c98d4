"""Checkpoints that bitsandbytes wrote, as bases; and checkpoints that it reads, out of modq."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import modq
from modq.errors import CheckpointError, OptionError
from modq.hf.foreign import save_as
from modq.model import quantized_layers

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes, the witness, is not installed")

pytestmark = pytest.mark.filterwarnings(
    # peft 0.21 asks transformers 5.23 by an old name
    "ignore:`is_gradient_checkpointing` is deprecated",
    # transformers' own words about a config given beside a checkpoint's
    "ignore:You passed `quantization_config`",
)

KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"bnb_4bit_quant_type": "nf4"},
    "nf4-nested": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
    "fp4-nested": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "nf4-nested-bf16-storage": {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": torch.bfloat16,
    },
    "nf4-fp32-storage": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.float32},
}
IDS = torch.arange(4, 20)[None]


@pytest.fixture(scope="module")
def theirs(
    tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, dict[str, Tensor]]]:
    """`theirs("nf4", "gpt2")`: a folder that bitsandbytes wrote, and its weights as it dequantizes them."""
    made: dict[tuple[str, str], tuple[Path, dict[str, Tensor]]] = {}

    def write(kind: str, architecture: str = "llama") -> tuple[Path, dict[str, Tensor]]:
        if (kind, architecture) not in made:
            config = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **KINDS[kind]
            )
            model = AutoModelForCausalLM.from_pretrained(tiny(architecture), quantization_config=config)
            folder = tmp_path_factory.mktemp(kind)
            model.save_pretrained(folder)
            made[kind, architecture] = folder, dequantized(model)
        return made[kind, architecture]

    return write


def dequantized(model: Any) -> dict[str, Tensor]:
    return {
        name: bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        for name, module in model.named_modules()
        if isinstance(module, bnb.nn.Linear4bit)
    }


def ours(folder: Path, **wanted: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=modq.ModqConfig(takeover=True), **wanted
    )


def assert_holds(model: Any, weights: dict[str, Tensor]) -> None:
    layers = dict(quantized_layers(model))
    assert layers.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(layers[name].dequantize(weight.dtype), weight), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_bitsandbytes_becomes_a_base_with_the_same_weights(kind, theirs, tmp_path):
    folder, weights = theirs(kind)
    model = ours(folder)
    assert_holds(model, weights)
    dense = AutoModelForCausalLM.from_pretrained(folder, quantization_config=modq.ModqConfig(takeover=True))
    dense = dense.dequantize()
    torch.testing.assert_close(model(IDS).logits, dense(IDS).logits)
    model.save_pretrained(tmp_path / "modq")  # from here on it is modq's own
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "modq")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    trained = get_peft_model(again, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    trained(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in trained.parameters() if p.requires_grad)


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "qwen2", "gemma"])
def test_other_architectures_come_in_too(architecture, theirs):
    folder, weights = theirs("nf4-nested", architecture)
    assert_holds(ours(folder), weights)


def test_a_device_map_is_made_for_it(theirs):
    folder, weights = theirs("nf4")
    assert_holds(ours(folder, device_map="auto"), weights)


def test_dense_tensors_follow_the_dtype_asked_for(theirs):
    model = ours(theirs("nf4")[0], dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["nf4", "nf4-nested", "fp4", "fp4-nested"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_bitsandbytes_loads_what_modq_writes(kind, architecture, tiny, tmp_path):
    quant_type, _, nested = kind.partition("-")
    config = modq.ModqConfig("nf4", quant_type=quant_type, double_quant=bool(nested))
    model = AutoModelForCausalLM.from_pretrained(tiny(architecture), quantization_config=config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_as(model, tmp_path / "out", "bitsandbytes")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert read.quantization_method == "bitsandbytes"
    assert_holds(model, dequantized(read))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert model.config.quantization_config.to_dict()["quant_method"] == "modq"
    assert_holds(ours(tmp_path / "out"), dequantized(read))


def test_linears_that_stay_dense_stay_so_for_bitsandbytes(tiny_llama, tmp_path):
    config = modq.ModqConfig("nf4", layers={"down_proj": None})
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config)
    save_as(model, tmp_path / "out", "bitsandbytes")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(read.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert_holds(model, dequantized(read))


def test_with_bitsandbytes_installed_its_own_loading_stays(theirs):
    model = AutoModelForCausalLM.from_pretrained(theirs("nf4")[0])
    assert isinstance(model.model.layers[0].self_attn.q_proj, bnb.nn.Linear4bit)


@pytest.mark.parametrize("names", ["bitsandbytes", "other, bitsandbytes", "all"])
def test_the_environment_can_ask_for_a_takeover(names, theirs, monkeypatch):
    folder, weights = theirs("nf4")
    monkeypatch.setenv("MODQ_TAKEOVER", names)
    assert_holds(AutoModelForCausalLM.from_pretrained(folder), weights)


def test_without_bitsandbytes_its_checkpoints_load_by_themselves(theirs):
    folder, _ = theirs("nf4-nested")
    script = (
        "import sys; sys.modules['bitsandbytes'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
        "print(type(model.model.layers[0].mlp.up_proj).__module__)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["modq.linear"], done.stderr


def edited(folder: Path, target: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    target.mkdir()
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text((folder / "config.json").read_text())
    return target


LAYER = "model.layers.1.mlp.up_proj"


def garble_state(tensors):
    tensors[f"{LAYER}.weight.quant_state.bitsandbytes__nf4"] = torch.zeros(9, dtype=torch.uint8)


def shorten_weight(tensors):
    tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"][:-5].clone()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{LAYER}.weight.quant_map"), "lacks weight.quant_map; is a shard missing?"),
        (
            lambda t: t[f"{LAYER}.weight.quant_map"].mul_(2),
            "weight.quant_map is not the table of bitsandbytes",
        ),
        (garble_state, "is not the JSON of a 4-bit linear"),
        (shorten_weight, "codes, expected the 6144 of shape (96, 64)"),
    ],
    ids=["missing tensor", "other table", "garbled state", "short weight"],
)
def test_a_damaged_checkpoint_is_one_line_that_names_the_layer(change, said, theirs, tmp_path):
    folder = edited(theirs("nf4")[0], tmp_path / "bad", change)
    with pytest.raises(CheckpointError) as caught:
        ours(folder)
    assert str(caught.value).startswith(f"{LAYER}: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_taken_over_is_said_in_one_line(theirs, tiny_llama, tmp_path):
    with pytest.raises(CheckpointError, match="this one is dense"):
        ours(tiny_llama)
    with pytest.raises(
        OptionError, match=r"quantized already \(quant_method 'bitsandbytes'\).*takeover=True"
    ):
        AutoModelForCausalLM.from_pretrained(theirs("nf4")[0], quantization_config=modq.ModqConfig("nf4"))
    with pytest.raises(OptionError, match="takes nothing else"):
        modq.ModqConfig("nf4", takeover=True)
    config = json.loads((tiny_llama / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match="no usable backend reads quant_method 'awq'; formats that are read"
    ):
        ours(tmp_path)


def test_a_format_that_the_model_cannot_take_is_refused(tiny_llama, tmp_path):
    mixed = modq.ModqConfig("nf4", layers={"up_proj": {"quant_type": "fp4"}})
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=mixed)
    with pytest.raises(OptionError, match="one config for all layers, the model's would need 2"):
        save_as(model, tmp_path / "out", "bitsandbytes")
    with pytest.raises(OptionError, match="does not write format 'gguf'; it writes 'bitsandbytes'"):
        save_as(model, tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()

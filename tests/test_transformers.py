"""transformers models quantized while loading, saved, reloaded, made dense again; what a bad file gets."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    NomicBertConfig,
    NomicBertModel,
    PreTrainedModel,
    T5EncoderModel,
    pipeline,
)
from transformers.pytorch_utils import Conv1D

import modq
from modq.errors import BackendError, CheckpointError, ModqError, OptionError, ShapeError, WeightError
from modq.model import dense_linears, quantized_layers
from modq.registry import KNOWN_PACKAGES

NF4 = modq.ModqConfig("nf4")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)

QUANTIZED = {
    "llama": "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj "
    "mlp.gate_proj mlp.up_proj mlp.down_proj",
    "opt": "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj fc1 fc2",
    "bloom": "self_attention.query_key_value self_attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h",
    "gpt2": "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj",
    "t5": "SelfAttention.q SelfAttention.k SelfAttention.v SelfAttention.o "
    "EncDecAttention.q EncDecAttention.k EncDecAttention.v EncDecAttention.o "
    "DenseReluDense.wi_0 DenseReluDense.wi_1",
}
QUANTIZED |= dict.fromkeys(["mistral", "qwen2", "qwen3", "gemma"], QUANTIZED["llama"])
ARCHITECTURES = pytest.mark.parametrize("architecture", list(QUANTIZED))

PARTLY_ON_DISK = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "cpu",
    "model.norm": "cpu",
    "lm_head": "disk",
}


def auto(architecture: str) -> Any:
    return AutoModelForSeq2SeqLM if architecture == "t5" else AutoModelForCausalLM


def load(folder: Path, architecture: str = "llama", **given: Any) -> PreTrainedModel:
    return auto(architecture).from_pretrained(folder, **given)


def quantize(folder: Path, architecture: str = "llama", **given: Any) -> PreTrainedModel:
    return load(folder, architecture, **{"quantization_config": NF4, **given})


def quantized_names(model: nn.Module) -> set[str]:
    return {name for name, _ in quantized_layers(model)}


def dense_names(model: nn.Module) -> set[str]:
    return {name for name, _ in dense_linears(model)}


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    """Return the logits, or the last hidden state of a model without a head."""
    ids = torch.arange(4, 20).view(2, 8)
    decoder = {"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {}
    return next(iter(model.eval()(input_ids=ids, **decoder).values()))


def assert_equal(left: nn.Module, right: nn.Module) -> None:
    """Equal tensors by name, dtype and bits; equal results."""
    a, b = left.state_dict(), right.state_dict()
    assert a.keys() == b.keys()
    assert [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])] == []
    assert torch.equal(output(left), output(right))


@pytest.fixture(scope="session")
def packed(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`packed("opt", torch.float16)`: the folder of that model quantized, in shards; never write into it."""
    folders: dict[Any, Path] = {}

    def folder(architecture: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
        key = architecture, dtype
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp(f"{architecture}-nf4")
            model = quantize(tiny(*key), architecture, dtype=dtype)
            model.save_pretrained(folders[key], max_shard_size="12KB")
            for file in tiny(*key).glob("tokenizer*"):
                shutil.copy(file, folders[key])
        return folders[key]

    return folder


# What becomes quantized


@ARCHITECTURES
def test_the_linears_inside_are_quantized_and_heads_and_tied_weights_are_not(
    tiny: Callable[..., Path], architecture: str
) -> None:
    model = quantize(tiny(architecture), architecture)
    parts = QUANTIZED[architecture].split()
    assert {part for part in parts for name in quantized_names(model) if name.endswith(part)} == set(parts)
    assert all(name.endswith(tuple(parts)) for name in quantized_names(model))
    dense = {"lm_head"} | {name for name in dense_names(model) if name.endswith(".wo")}
    assert dense_names(model) == dense
    assert (len(dense) > 1) == (architecture == "t5")
    if architecture in ("gemma", "opt", "bloom", "gpt2"):
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@ARCHITECTURES
@DTYPES
def test_each_quantized_weight_is_near_the_dense_one(
    tiny: Callable[..., Path], architecture: str, dtype: torch.dtype
) -> None:
    folder = tiny(architecture, dtype)
    model, dense = quantize(folder, architecture, dtype=dtype), load(folder, architecture, dtype=dtype)
    for name, layer in quantized_layers(model):
        original = dense.get_submodule(name)
        weight = original.weight.T if isinstance(original, Conv1D) else original.weight
        assert layer.weight.dtype == dtype
        assert 0 < (layer.weight - weight).float().norm() / weight.float().norm() < 0.14, name
        if original.bias is not None:
            assert torch.equal(layer.bias, original.bias), name


def test_t5_keeps_wo_in_float32_where_the_rest_is_float16(tiny: Callable[..., Path]) -> None:
    model = quantize(tiny("t5", torch.float16), "t5", dtype=torch.float16)
    kept = [module for name, module in model.named_modules() if name.endswith(".wo")]
    assert kept
    assert {type(module) for module in kept} == {nn.Linear}
    assert {module.weight.dtype for module in kept} == {torch.float32}
    assert output(model).isfinite().all()


@pytest.mark.parametrize(
    ("skip", "dense"),
    [
        (None, {"lm_head"}),
        ([], set()),
        (["lm_head"], {"lm_head"}),
        (["q_proj"], {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}),
        (["_proj"], set()),  # not a whole part of a name
        ([r"layers\.1", "mlp", "lm_head"], "all but the attention of layer 0"),
    ],
    # not str: a set's order differs between the test processes
    ids=["default", "nothing", "head", "one name", "part of a name", "several"],
)
def test_modules_to_not_convert_are_whole_parts_of_names_and_replace_the_default(
    tiny_llama: Path, skip: list[str] | None, dense: Any
) -> None:
    model = quantize(tiny_llama, quantization_config=modq.ModqConfig("nf4", modules_to_not_convert=skip))
    if isinstance(dense, str):
        assert quantized_names(model) == {f"model.layers.0.self_attn.{x}_proj" for x in "qkvo"}
    else:
        assert dense_names(model) == dense


def test_tied_weights_stay_dense_whatever_is_asked(tiny: Callable[..., Path], tmp_path: Path) -> None:
    config = modq.ModqConfig("nf4", modules_to_not_convert=[])
    model = quantize(tiny("gemma"), quantization_config=config)
    assert dense_names(model) == {"lm_head"}
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert_equal(model, again)
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_layers_mix_options_backends_and_dense(tiny_llama: Path, tmp_path: Path) -> None:
    layers = {
        r"layers\.0\..*q_proj": {"quant_type": "fp4", "block_size": 128},
        r"layers\.0\..*k_proj": {"backend": "nf4", "double_quant": False},
        "down_proj": None,
        r"layers\.0": {"group_size": 32},
    }
    model = quantize(tiny_llama, quantization_config=modq.ModqConfig("nf4", layers=layers))
    model.save_pretrained(tmp_path, max_shard_size="12KB")
    again = load(tmp_path)
    assert_equal(model, again)
    for each in (model, again):
        first, second = each.model.layers
        told = first.self_attn.q_proj.options
        assert (told.quant_type, told.block_size, told.double_quant) == ("fp4", 128, True)
        told = first.self_attn.k_proj.options
        assert (told.quant_type, told.block_size, told.double_quant) == ("nf4", 64, False)
        assert first.mlp.up_proj.options.block_size == 32
        assert second.mlp.up_proj.options.block_size == 64
        assert {type(layer.mlp.down_proj) for layer in (first, second)} == {nn.Linear}
    record = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["resolved"]
    assert len(record["schemes"]) == 4
    assert record["modules"].keys() == quantized_names(model)


def test_without_a_default_backend_only_the_named_layers_are_quantized(tiny_llama: Path) -> None:
    config = modq.ModqConfig(layers={"v_proj": {"backend": "nf4"}})
    model = quantize(tiny_llama, quantization_config=config)
    assert quantized_names(model) == {f"model.layers.{i}.self_attn.v_proj" for i in (0, 1)}


def test_a_head_that_the_checkpoint_lacks_is_initialised_dense(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    BertModel(BertConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path / "base")
    given = {"num_labels": 3, "quantization_config": NF4}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", **given)
    assert dense_names(model) == {"classifier"}
    assert len(quantized_names(model)) == 7
    model.save_pretrained(tmp_path / "nf4")
    assert_equal(model, AutoModelForSequenceClassification.from_pretrained(tmp_path / "nf4"))


def test_one_config_object_serves_several_models(tiny: Callable[..., Path], tmp_path: Path) -> None:
    config = modq.ModqConfig("nf4")
    llama = type(load(tiny("llama"))).from_pretrained(tiny("llama"), quantization_config=config)
    opt = type(load(tiny("opt"))).from_pretrained(tiny("opt"), quantization_config=config)
    assert config.resolved is None
    for model in (llama, opt):
        assert model.config.quantization_config.resolved["modules"].keys() == quantized_names(model)


# Saving and reloading


@ARCHITECTURES
@DTYPES
def test_a_reloaded_model_is_bit_identical(
    tiny: Callable[..., Path], packed: Callable[..., Path], architecture: str, dtype: torch.dtype
) -> None:
    folder = packed(architecture, dtype)
    assert len(list(folder.glob("*.safetensors"))) >= 3
    again, report = load(folder, architecture, output_loading_info=True)
    assert not any(report.values())
    assert_equal(quantize(tiny(architecture, dtype), architecture, dtype=dtype), again)
    assert output(again).dtype == dtype


@ARCHITECTURES
def test_a_model_quantized_in_memory_is_the_one_quantized_while_loading(
    tiny: Callable[..., Path], packed: Callable[..., Path], architecture: str, tmp_path: Path
) -> None:
    model = modq.quantize_model(load(tiny(architecture), architecture), "nf4")
    assert_equal(model, quantize(tiny(architecture), architecture))
    model.save_pretrained(tmp_path)
    assert_equal(model, load(tmp_path, architecture))
    written, expected = (
        json.loads((f / "config.json").read_text()) for f in (tmp_path, packed(architecture))
    )
    assert written == expected


@ARCHITECTURES
def test_a_dequantized_model_is_an_ordinary_dense_one(
    packed: Callable[..., Path], architecture: str, tmp_path: Path
) -> None:
    quantized = load(packed(architecture), architecture)
    dense = load(packed(architecture), architecture).dequantize()
    assert not quantized_names(dense)
    torch.testing.assert_close(output(dense), output(quantized))
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = load(tmp_path, architecture)
    assert_equal(dense, again)
    assert not getattr(again, "is_quantized", False)
    assert {type(module) for _, module in dense_linears(again.base_model)} == {
        Conv1D if architecture == "gpt2" else nn.Linear
    }


@pytest.mark.parametrize("architecture", ["llama", "opt", "bloom", "gpt2", "t5"])
def test_the_bare_base_model_loads_what_the_model_with_a_head_saved_and_back(
    tiny: Callable[..., Path], packed: Callable[..., Path], architecture: str, tmp_path: Path
) -> None:
    whole = load(packed(architecture), architecture)
    base = AutoModel.from_pretrained(packed(architecture))
    assert len(quantized_names(base)) == len(quantized_names(whole))
    if architecture != "t5":  # its base model is not an attribute of it
        assert_equal(base, whole.base_model)
    assert_equal(base, AutoModel.from_pretrained(tiny(architecture), quantization_config=NF4))
    base.save_pretrained(tmp_path)
    again = load(tmp_path, architecture)
    assert quantized_names(again) == quantized_names(whole)


def test_a_part_of_the_saved_model_loads(packed: Callable[..., Path]) -> None:
    whole, encoder = load(packed("t5"), "t5"), T5EncoderModel.from_pretrained(packed("t5"))
    assert quantized_names(encoder) == {n for n in quantized_names(whole) if n.startswith("encoder.")}
    ids = torch.arange(4, 20).view(2, 8)
    with torch.no_grad():
        assert torch.equal(encoder(ids).last_hidden_state, whole.eval().encoder(ids).last_hidden_state)


def test_a_checkpoint_with_fused_projections_is_split_quantized_and_reloaded(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    NomicBertModel(NomicBertConfig(vocab_size=64, pad_token_id=0, **sizes)).save_pretrained(
        tmp_path / "dense"
    )
    assert any(name.endswith("Wqkv.weight") for name in load_file(tmp_path / "dense/model.safetensors"))
    dense = NomicBertModel.from_pretrained(tmp_path / "dense")
    for number, model in enumerate(
        (
            NomicBertModel.from_pretrained(tmp_path / "dense", quantization_config=NF4),
            NomicBertModel.from_pretrained(
                tmp_path / "dense", quantization_config=modq.ModqConfig("nf4", layers={"k_proj": None})
            ),
            modq.quantize_model(dense, "nf4"),
        )
    ):
        assert len(quantized_names(model)) == (12 if number == 1 else 14)
        model.save_pretrained(tmp_path / str(number))
        assert_equal(model, NomicBertModel.from_pretrained(tmp_path / str(number)))


def test_saving_records_what_each_module_is_by_then(packed: Callable[..., Path], tmp_path: Path) -> None:
    model = load(packed())
    layer = model.model.layers[0].mlp
    layer.up_proj = nn.Linear(64, 96, bias=False)
    layer.down_proj = modq.QuantLinear.from_linear(nn.Linear(96, 64, bias=False), "nf4", block_size=128)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert_equal(model, again)
    assert type(again.model.layers[0].mlp.up_proj) is nn.Linear
    assert again.model.layers[0].mlp.down_proj.options.block_size == 128


def test_a_quantized_checkpoint_loads_without_import_modq(
    packed: Callable[..., Path], tmp_path: Path
) -> None:
    script = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "with torch.no_grad():\n"
        "    torch.save(model(torch.arange(4, 20).view(2, 8)).logits, sys.argv[2])\n"
    )
    command = [sys.executable, "-W", "error:::modq", "-c", script, str(packed()), str(tmp_path / "logits")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits"), output(load(packed())))


def test_config_json_holds_what_was_asked_and_what_each_module_became(packed: Callable[..., Path]) -> None:
    written = AutoConfig.from_pretrained(packed()).quantization_config
    assert {"quant_method", "backend", "layers", "modules_to_not_convert", "options"} <= written.keys()
    assert written["quant_method"] == "modq"
    config = modq.ModqConfig.from_dict(written)
    assert config.to_dict() == written
    assert json.loads(config.to_json_string()) == written
    assert config.resolved["modules"] == dict.fromkeys(sorted(quantized_names(load(packed()))), 0)
    assert config.resolved["schemes"] == [
        {
            "backend": "nf4",
            "package": "modq-nf4",
            "version": modq.__version__,
            "format_version": 1,
            "options": {"quant_type": "nf4", "block_size": 64, "double_quant": True},
            "meta": {"quant_type": "nf4", "block_size": 64, "double_quant": True},
        }
    ]


def test_a_config_as_plain_data_quantizes_too(tiny_llama: Path) -> None:
    assert_equal(quantize(tiny_llama), quantize(tiny_llama, quantization_config=NF4.to_dict()))


# Devices


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_maps_change_nothing(tiny_llama: Path, packed: Callable[..., Path], device_map: Any) -> None:
    expected = load(packed())
    assert_equal(expected, quantize(tiny_llama, device_map=device_map))
    assert_equal(expected, load(packed(), device_map=device_map))


# transformers says of any offloaded model that it is about to be saved
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules:UserWarning")
@pytest.mark.parametrize("prequantized", [True, False], ids=["prequantized", "quantized while loading"])
def test_a_model_partly_on_disk_gives_the_same_and_saves_the_same(
    tiny_llama: Path, packed: Callable[..., Path], tmp_path: Path, prequantized: bool
) -> None:
    given = {"device_map": PARTLY_ON_DISK, "offload_folder": tmp_path / "offload"}
    model = load(packed(), **given) if prequantized else quantize(tiny_llama, **given)
    layer = model.model.layers[0].mlp.up_proj
    assert {tensor.device.type for _, tensor in layer.named_packed()} == {"meta"}
    expected = load(packed())
    for _ in range(2):
        assert torch.equal(output(model), output(expected))
    model.save_pretrained(tmp_path / "saved")
    assert_equal(load(tmp_path / "saved"), expected)
    with pytest.raises(CheckpointError, match="is offloaded; to dequantize the model, load it without"):
        model.dequantize()


# Using


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
def test_copies_are_equal_and_independent(
    packed: Callable[..., Path], tmp_path: Path, copied: Callable[[nn.Module], Any]
) -> None:
    model = load(packed())
    other = copied(model)
    assert_equal(model, other)
    other.save_pretrained(tmp_path)
    assert_equal(model, load(tmp_path))
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.data.zero_()
    assert not torch.equal(output(other), output(model))
    assert torch.equal(output(model), output(load(packed())))


def test_a_state_dict_carries_a_model_over(packed: Callable[..., Path], tiny_llama: Path) -> None:
    model = load(tiny_llama)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-0.7)
    modq.quantize_model(model, "nf4")
    source = load(packed())
    assert not torch.equal(output(model), output(source))
    model.load_state_dict(source.state_dict())
    assert_equal(model, source)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5"])
def test_generation_with_a_cache_gives_the_tokens_of_the_logits(
    packed: Callable[..., Path], architecture: str
) -> None:
    model = load(packed(architecture), architecture).eval()
    ids = torch.arange(4, 12)[None]
    steps = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    made = model.generate(ids, **steps)
    plain = model.generate(ids, use_cache=False, **steps)
    assert made.shape[1] == (5 if architecture == "t5" else 12)
    assert torch.equal(made, plain)


def test_a_pipeline_makes_text(packed: Callable[..., Path], tiny_llama: Path) -> None:
    told = {"max_new_tokens": 4, "do_sample": False}
    made = pipeline("text-generation", model=str(packed()))("the union is", **told)
    assert made[0]["generated_text"].startswith("the union is")
    given = {"model_kwargs": {"quantization_config": NF4}}
    assert pipeline("text-generation", model=str(tiny_llama), **given)("the union is", **told) == made


def test_sizes_are_those_of_what_is_held(packed: Callable[..., Path], tiny_llama: Path) -> None:
    model, dense = load(packed()), load(tiny_llama)
    held = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    assert held <= model.get_memory_footprint() < held + 1000  # and buffers
    saved = sum(p.numel() for name in quantized_names(model) for p in dense.get_submodule(name).parameters())
    assert dense.get_memory_footprint() - model.get_memory_footprint() > 4 * saved * 0.8
    left = dense.num_parameters() - saved
    assert model.num_parameters(only_trainable=True) == left
    assert model.dtype == torch.float32


def test_loading_into_another_dtype_keeps_every_packed_bit(packed: Callable[..., Path]) -> None:
    wide, narrow = load(packed()), load(packed(), dtype=torch.bfloat16)
    for (_, a), (_, b) in zip(quantized_layers(wide), quantized_layers(narrow), strict=True):
        assert b.weight.dtype == torch.bfloat16
        assert all(
            torch.equal(x, y) for (_, x), (_, y) in zip(a.named_packed(), b.named_packed(), strict=True)
        )
    assert output(narrow).dtype == torch.bfloat16


# What must fail, and say so in one line


def with_tensors(source: Path, folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> Path:
    """Copy a checkpoint into one file with its tensors edited."""
    shutil.copytree(source, folder)
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def with_config(source: Path, folder: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """Copy a checkpoint with its quantization_config edited."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    edit(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def message(error: pytest.ExceptionInfo[BaseException]) -> str:
    """Return the error's message, having checked that it is one line."""
    assert "\n" not in str(error.value)
    return str(error.value)


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("edit", "error", "said"),
    [
        (lambda t: t.pop(f"{UP}.weight"), CheckpointError, f"no tensor {UP}.weight to quantize"),
        (
            lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"].T.contiguous()}),
            ShapeError,
            f"{UP}: the checkpoint's weight is (64, 96), the model's config expects (96, 64)",
        ),
        (lambda t: t[f"{UP}.weight"][3, 5].fill_(torch.nan), WeightError, f"{UP}: weight of shape"),
        (lambda t: t[f"{UP}.weight"][3, 5].fill_(torch.inf), WeightError, "1 NaN or infinite value"),
    ],
    ids=["missing", "transposed", "nan", "infinite"],
)
def test_a_bad_dense_weight_is_named(
    tiny_llama: Path, tmp_path: Path, edit: Callable[..., Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error) as raised:
        quantize(with_tensors(tiny_llama, tmp_path / "bad", edit))
    assert said in message(raised)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: t.pop(f"{UP}.codes"), f"no tensor {UP}.codes of the expected shape"),
        (lambda t: t.update({f"{UP}.codes": t[f"{UP}.codes"].float()}), f"{UP}.codes is torch.float32"),
        (lambda t: t.update({f"{UP}.codes": t[f"{UP}.codes"].int()}), f"{UP}.codes is torch.int32"),
    ],
    ids=["missing", "float", "int32"],
)
def test_a_bad_packed_tensor_is_named(
    packed: Callable[..., Path], tmp_path: Path, edit: Callable[..., Any], said: str
) -> None:
    with pytest.raises(CheckpointError) as raised:
        load(with_tensors(packed(), tmp_path / "bad", edit))
    assert said in message(raised)


def test_a_packed_tensor_missing_on_disk_is_named(packed: Callable[..., Path], tmp_path: Path) -> None:
    folder = with_tensors(packed(), tmp_path / "bad", lambda tensors: tensors.pop(f"{UP}.codes"))
    with pytest.raises(CheckpointError, match=f"no tensor {UP}.codes"):
        load(folder, device_map=PARTLY_ON_DISK, offload_folder=tmp_path / "offload")


def test_a_packed_tensor_of_the_wrong_shape_is_refused_even_if_mismatches_are_ignored(
    packed: Callable[..., Path], tmp_path: Path
) -> None:
    def cut(tensors: dict[str, Tensor]) -> None:
        tensors[f"{UP}.codes"] = tensors[f"{UP}.codes"][:10].clone()

    folder = with_tensors(packed(), tmp_path / "bad", cut)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):  # as transformers does for any model
        load(folder)
    with pytest.raises(CheckpointError, match=f"no tensor {UP}.codes"):
        load(folder, ignore_mismatched_sizes=True)


def first_scheme(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["resolved"]["schemes"][0].update(changes)


@pytest.mark.parametrize(
    ("edit", "error", "said"),
    [
        (first_scheme(backend="ours", package="modq-ours"), BackendError, "pip install modq-ours"),
        (first_scheme(backend="x", package="evil"), BackendError, "install that package if you trust it"),
        (first_scheme(backend="ours", package="evil"), BackendError, "install that package if you trust it"),
        (first_scheme(options={"width": 3}), CheckpointError, "has no option 'width'"),
        (lambda c: c["resolved"].update(schema=2), CheckpointError, "has schema 2, written by modq"),
        (lambda c: c.update(resolved=None), CheckpointError, "records no modules"),
        (lambda c: c.pop("layers"), CheckpointError, "lacks layers"),
        (lambda c: c["resolved"].pop("schemes"), CheckpointError, "is incomplete"),
        (lambda c: c["resolved"]["modules"].update({UP: 7}), CheckpointError, "is incomplete"),
        (lambda c: c["resolved"].update(modules={"h.0.fc": 0}), CheckpointError, "'h.0.fc', and Llama"),
    ],
    ids=[
        "backend", "foreign", "name of ours", "options", "schema",
        "no record", "cut", "no schemes", "no such scheme", "other model",
    ],
)  # fmt: skip
def test_a_bad_quantization_config_is_explained(
    packed: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    edit: Callable[..., Any],
    error: type[Exception],
    said: str,
) -> None:
    monkeypatch.setitem(KNOWN_PACKAGES, "ours", "modq-ours")
    with pytest.raises(error) as raised:
        load(with_config(packed(), tmp_path / "bad", edit))
    assert said in message(raised)


def test_a_newer_format_of_the_backend_is_refused_when_it_is_read(
    packed: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="format 2, expected 1"):
        output(load(with_config(packed(), tmp_path / "bad", first_scheme(format_version=2))))


@pytest.mark.parametrize(
    ("backend", "given", "said"),
    [
        ("nope", {}, "no quantizer backend 'nope' is installed"),
        ("nf4", {"widht": 3}, "has no option 'widht'; it has block_size"),
        ("nf4", {"block_size": 48}, "block_size=48"),
        ("nf4", {"bits": 3}, "bits=3"),
        ("nf4", {"layers": {"(": None}}, "'(' is not a regex"),
        ("nf4", {"layers": {"q_proj": {"widht": 3}}}, "has no option 'widht'"),
        ("nf4", {"modules_to_not_convert": "lm_head"}, "expected a list of names"),
        (None, {}, "names no backend"),
    ],
)
def test_a_bad_config_is_refused_before_anything_is_loaded(
    backend: str | None, given: dict[str, Any], said: str
) -> None:
    with pytest.raises(ModqError) as raised:
        modq.ModqConfig(backend, **given)
    assert said in message(raised)


def test_a_regex_that_matches_no_layer_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(OptionError) as raised:
        quantize(tiny_llama, quantization_config=modq.ModqConfig("nf4", layers={"slef_attn": None}))
    assert "'slef_attn' matches no linear of the model" in message(raised)

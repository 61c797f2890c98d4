"""Whole checkpoints of the paper's authors as bases through transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, get_peft_model
from quipsharp_files import KINDS, make, write
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    modeling_utils,
)

import modq
from modq.cli import main
from modq.errors import CheckpointError, OptionError
from modq.hf import foreign
from modq.model import quantized_layers
from modq_quipsharp import INFO

IDS = torch.arange(4, 36).view(2, 16)
QKV = "model.layers.1.self_attn.qkv_proj"

Written = tuple[Path, LlamaForCausalLM]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {key: t for file in folder.glob("*.safetensors") for key, t in load_file(file).items()}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Written]:
    """`theirs(7)`: a folder of theirs with this codebook, and the dense float64 model that it stands for."""
    made: dict[int, Written] = {}

    def written(number: int) -> Written:
        if number not in made:
            folder = tmp_path_factory.mktemp("theirs") / str(number)
            made[number] = folder, make(folder, number)
        return made[number]

    return written


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def shared_in(model: Any) -> set[frozenset[str]]:
    """The names of tensors that are one Parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


def run(*args: object) -> str:
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output
    return result.stdout


def error(given: Tensor, exact: Tensor) -> float:
    return float((given - exact).detach().norm() / exact.detach().norm())


@torch.no_grad()
@pytest.mark.parametrize("number", KINDS)
def test_a_checkpoint_computes_what_it_stands_for(number: int, theirs: Callable[[int], Written]) -> None:
    folder, dense = theirs(number)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layers = dict(quantized_layers(model))
    assert len(layers) == 14
    assert {(its.backend, its.options.bits) for its in layers.values()} == {("quipsharp", KINDS[number][2])}
    for name, layer in layers.items():
        assert error(layer.dequantize(torch.float64), dense.get_submodule(name).weight) <= 2e-7, name
    exact, in_float32 = dense(IDS).logits, deepcopy(dense).float()(IDS).logits
    assert error(model(IDS).logits, exact) <= 2 * error(in_float32, exact)


@pytest.mark.parametrize("number", KINDS)
def test_it_trains_and_is_saved_as_modqs_own(
    number: int, theirs: Callable[[int], Written], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(theirs(number)[0])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "quip_params" not in json.loads((tmp_path / "config.json").read_text())
    left, right = model.state_dict(), again.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    trained = get_peft_model(again, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    trained(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in trained.parameters() if p.requires_grad)


def test_codes_that_linears_share_are_in_memory_once_and_stored_once(
    theirs: Callable[[int], Written], tmp_path: Path
) -> None:
    folder = theirs(17)[0]
    codes = sum(t.nbytes for key, t in tensors_of(folder).items() if key.endswith("Qidxs"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "modq")
    stored = tensors_of(tmp_path / "modq")
    assert sum(t.nbytes for key, t in stored.items() if key.endswith(("codes", "residual"))) == codes
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "modq")
    bare = AutoModel.from_pretrained(tmp_path / "modq")  # its names have no prefix
    for each in (model, again, deepcopy(again).to(torch.bfloat16), bare, AutoModel.from_pretrained(folder)):
        groups, prefix = shared_in(each), "" if each.base_model is each else "model."
        assert len(groups) == 12  # codes, residual and input_scales of two modules in two blocks
        assert {f"{prefix}layers.0.self_attn.{part}_proj.codes" for part in "qkv"} in groups
        named = each.named_parameters()  # each once
        assert sum(p.nbytes for name, p in named if name.endswith(("codes", "residual"))) == codes
    shown = json.loads(run("inspect", tmp_path / "modq", "--json"))
    assert shown["sizes"]["held"] == sum(p.nbytes for p in model.parameters())
    assert all(4 < scheme["bits_per_weight"] < 4.5 for scheme in shown["schemes"])


@pytest.mark.parametrize("record", [["x"], {"codes": "x.codes"}, {"x.codes": 1}], ids=str)
def test_a_damaged_record_of_shared_tensors_is_one_line(
    record: Any, theirs: Callable[[int], Written], tmp_path: Path
) -> None:
    AutoModelForCausalLM.from_pretrained(theirs(7)[0]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["resolved"]["shared"] = record
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"record of shared tensors is damaged .*edited by hand"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_commands_take_it(theirs: Callable[[int], Written], tmp_path: Path) -> None:
    folder, text, adapter = theirs(7)[0], tmp_path / "text.txt", tmp_path / "adapter"
    words = [f"w{i}" for i in range(60)]
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    text.write_text(" ".join(words * 4))
    assert "quantized  quip#" in run("inspect", folder)
    fast = ("--max-length", 32, "--batch-size", 4, "--lr", 1e-2, "--epochs", 2)
    run("finetune", folder, "--data", text, "--output", adapter, *fast)
    scored = ("eval", folder, "--text", text, "--window", 32, "--json")
    before, after = (json.loads(run(*scored, *its)) for its in ((), ("--adapter", adapter)))
    assert after["nll"] < before["nll"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "modq")
    assert PeftModel.from_pretrained(model, adapter)  # it is the base that the adapter was trained on
    refused = CliRunner().invoke(
        main, ["quantize", str(folder), str(tmp_path / "q"), "--backend", "quipsharp"]
    )
    assert "is quantized already (quant_method 'quip#')" in refused.stderr


def test_no_import_of_modq_is_needed(theirs: Callable[[int], Written]) -> None:
    script = (
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(theirs(7)[0])!r})\n"
        "print(type(model.model.layers[0].mlp.up_proj).__module__)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["modq.linear"], done.stderr


def test_modeling_code_may_be_imported_before_modq(
    theirs: Callable[[int], Written], monkeypatch: pytest.MonkeyPatch
) -> None:
    early = modeling_utils.get_hf_quantizer.__wrapped__
    monkeypatch.setattr(modeling_utils, "get_hf_quantizer", early)
    foreign.wrap_choice()
    assert any(quantized_layers(AutoModelForCausalLM.from_pretrained(theirs(7)[0])))


def test_part_of_it_may_be_on_disk(theirs: Callable[[int], Written], tmp_path: Path) -> None:
    folder = theirs(7)[0]
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
    model.save_pretrained(tmp_path / "modq")
    places = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "model.layers.0"), "cpu")
    places |= {"model.layers.1": "disk", "lm_head": "disk"}
    for source in (folder, tmp_path / "modq"):
        given = {"device_map": places, "offload_folder": tmp_path / source.name}
        offloaded = AutoModelForCausalLM.from_pretrained(source, **given)
        assert torch.equal(offloaded(IDS).logits, model(IDS).logits)


def test_an_adapter_merges_into_a_part_and_comes_out_again(
    theirs: Callable[[int], Written], tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(theirs(17)[0], dtype=torch.float32)
    weights = {name: layer.dequantize() for name, layer in quantized_layers(base)}
    lora = LoraConfig(r=4, target_modules=["k_proj", "o_proj"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(base, lora)
    before = model(IDS).logits
    model.merge_adapter()
    for name in ("k_proj", "o_proj"):
        tuner = model.base_model.model.model.layers[1].self_attn.get_submodule(name)
        target = weights[f"model.layers.1.self_attn.{name}"] + tuner.get_delta_weight("default").detach()
        alone = modq.dequantize(modq.quantize(target, "quipsharp", bits=4))
        assert error(tuner.base_layer.dequantize(), target) <= 1.1 * error(alone, target)
    model.unmerge_adapter()
    assert torch.equal(model(IDS).logits, before)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, merged(IDS).logits)
    attention = again.model.layers[0].self_attn
    assert attention.q_proj.codes is attention.v_proj.codes
    assert attention.q_proj.codes is not attention.k_proj.codes


def without(*endings: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {key: t for key, t in tensors.items() if not key.endswith(endings)}


def having(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {**tensors, f"{QKV}.{name}": tensor}


@pytest.mark.parametrize(
    ("change", "other", "said"),
    [
        (having("codebook_id", torch.tensor(4)), {}, f"{QKV}: codebook_id 4 .* reads 7 .E8P12., 17 .* 18 "),
        (having("A", torch.zeros(4, 64)), {}, f"{QKV}: a QuIP# module has low-rank factors .A."),
        (having("bias", torch.zeros(128)), {}, f"{QKV}: a QuIP# module has a bias"),
        (having("fuse_scales", torch.ones(2)), {}, f"{QKV}: fuse_scales has 2 numbers, expected 3"),
        (
            having("SU", torch.ones(128).half()),
            {},
            f"{QKV}: Qidxs is torch.int64 of shape .128, 2., expected",
        ),
        (without(f"{QKV}.Qidxs"), {}, f"{QKV}: .* has SU, SV, .* of it and no Qidxs; is a shard missing"),
        (without("0.mlp.down_proj.Qidxs"), {}, "0.mlp.down_proj: .* of it and no Qidxs; is a shard missing"),
        (without(f"{QKV}.SU", f"{QKV}.SV"), {}, f"{QKV}: a QuIP# module lacks SU, SV; is a shard missing"),
        (without("Qidxs"), {}, "no tensor ..Qidxs, so nothing of format 'quip#'"),
        (
            without(),
            {"num_key_value_heads": 4},
            "SV has 128 outputs, expected q_proj 64 . k_proj 64 . v_proj",
        ),
        (
            without(),
            {"intermediate_size": 256},
            "down_proj: the file's weight is .64, 192., the model's .64, 256.",
        ),
        (without(), {"codebook": "HI4B1C"}, "config.json has codebook 'HI4B1C' .* codebook_id 7 is 'E8P12'"),
        (without(), {"lora_rank": 32}, "config.json has lora_rank 32: low-rank factors"),
        (without(), {"rescale_WH": True}, "config.json has rescale_WH, and a module lacks scaleWH"),
        (without(), {"outlier_channel_split": True}, "outlier_channel_split True: split channels"),
        (without(), {"model_type": "phi3"}, "no tensor model.layers.0.self_attn.qkv_proj.weight"),
    ],
)
def test_what_is_not_read_is_one_line_by_name(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    other: dict[str, Any],
    said: str,
    theirs: Callable[[int], Written],
    tmp_path: Path,
) -> None:
    folder = write(tmp_path / "bad", change(tensors_of(theirs(7)[0])), 7, **other)
    with pytest.raises(CheckpointError, match=said) as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_a_linear_that_the_model_lacks_is_named(
    theirs: Callable[[int], Written], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(INFO.formats[0], fused={**INFO.formats[0].fused, "qkv_proj": ("q_proj", "kv_proj")})
    monkeypatch.setattr(foreign, "known_formats", lambda: iter([("quipsharp", other)]))
    with pytest.raises(
        CheckpointError, match=r"stands for a linear .*kv_proj, and LlamaForCausalLM has none"
    ):
        AutoModelForCausalLM.from_pretrained(theirs(7)[0])


def test_it_is_neither_quantized_again_nor_written(theirs: Callable[[int], Written], tmp_path: Path) -> None:
    folder = theirs(7)[0]
    with pytest.raises(OptionError, match=r"quantized already \(quant_method 'quip#'\).*takeover=True"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=modq.ModqConfig("quipsharp"))
    wanted = modq.ModqConfig(takeover=True)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=wanted)
    with pytest.raises(OptionError, match="'quipsharp' does not write format 'quip#'; it writes none"):
        foreign.save_as(model, tmp_path, "quip#")
    with pytest.raises(AssertionError, match="does not write format 'quip#'; it writes none"):
        run("quantize", folder, tmp_path / "written", "--backend", "quipsharp", "--format", "quip#")

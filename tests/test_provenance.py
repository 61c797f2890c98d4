"""An adapter knows the base that it was trained on, and says so when it is loaded on another."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments

import modq
from modq.errors import CheckpointError, OptionError
from modq.hf.provenance import CHECK, FILE, describe_base, hash_codes, hash_weight
from modq.model import quantized_layers

pytestmark = [
    # peft 0.21 asks transformers 5.23 by the old name, at every attachment
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

CODES = "model.layers.0.self_attn.q_proj.codes"


@pytest.fixture(autouse=True)
def _default_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CHECK, raising=False)


def load(folder: Path, dtype: Any = torch.float32, cls: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """Load a dense checkpoint quantized, or with no options one as it is."""
    config = {"quantization_config": modq.ModqConfig(**options)} if options else {}
    return cls.from_pretrained(folder, dtype=dtype, **config)


def nf4(folder: Path, **more: Any) -> Any:
    return load(folder, backend="nf4", **more)


def adapted(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))


def edited(folder: Path, key: str, target: Path) -> Path:
    """Copy a checkpoint, with the first element of one tensor changed."""
    shutil.copytree(folder, target)
    with safe_open(target / "model.safetensors", framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
    first = tensors[key].view(-1)[:1]
    first.copy_(first ^ 1 if not first.is_floating_point() else first + 0.5)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def rewrite(adapter: Path, change: Callable[[Any], Any]) -> None:
    record = json.loads((adapter / FILE).read_text())
    change(record)
    (adapter / FILE).write_text(json.dumps(record))


def source(model: Any) -> str:
    value: str = model.config.quantization_config.resolved["source"]
    return value


@pytest.fixture
def packed(tiny_llama: Path, tmp_path: Path) -> Path:
    nf4(tiny_llama).save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


@pytest.fixture
def adapter(tiny_llama: Path, tmp_path: Path) -> Path:
    """The folder of an adapter over the tiny model in nf4."""
    adapted(nf4(tiny_llama)).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def other_weights(tiny_llama: Path, tmp_path: Path) -> Path:
    return edited(tiny_llama, "model.layers.1.mlp.down_proj.weight", tmp_path / "other")


# What is written


def test_the_side_file_says_what_the_base_is(adapter: Path) -> None:
    record = json.loads((adapter / FILE).read_text())
    assert (record["schema"], record["modq"]) == (1, modq.__version__)
    (scheme,) = record["base"]["schemes"]
    assert (scheme["backend"], scheme["package"]) == ("nf4", "modq-nf4")
    assert scheme.keys() >= {"version", "format_version", "options", "meta"}
    assert scheme["options"]["block_size"] == 64
    assert all(len(value) == 64 for value in (record["base"]["source"], scheme["codes"]))
    assert len(record["base"]["modules"]) == 14
    assert "layers.0.self_attn.q_proj" in record["base"]["modules"]
    assert [path.name for path in adapter.iterdir() if "modq" in path.name] == [FILE]


def test_the_trainer_writes_it(tiny_llama: Path, tmp_path: Path) -> None:
    data = Dataset.from_list([{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 2)
    arguments = TrainingArguments(
        tmp_path / "run", max_steps=1, report_to="none", use_cpu=True, dataloader_pin_memory=False
    )
    trainer = Trainer(model=adapted(nf4(tiny_llama)), args=arguments, train_dataset=data)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / FILE).read_bytes() == (tmp_path / "run/checkpoint-1" / FILE).read_bytes()
    PeftModel.from_pretrained(nf4(tiny_llama), tmp_path / "saved")


def test_each_named_adapter_has_its_own(tiny_llama: Path, tmp_path: Path) -> None:
    model = adapted(nf4(tiny_llama))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    assert (tmp_path / FILE).read_bytes() == (tmp_path / "second" / FILE).read_bytes()


def test_over_a_dense_base_there_is_none_and_a_stale_one_goes(adapter: Path, tiny_llama: Path) -> None:
    adapted(load(tiny_llama)).save_pretrained(adapter)
    assert not (adapter / FILE).exists()


def test_a_failed_write_leaves_the_old_file(
    adapter: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (adapter / FILE).read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("modq.hf.provenance.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        adapted(nf4(tiny_llama, block_size=32)).save_pretrained(adapter)
    assert (adapter / FILE).read_bytes() == before
    assert [path.name for path in adapter.iterdir() if "modq" in path.name] == [FILE]


# The source's hash


def test_every_way_to_a_base_gives_it_one_source(tiny_llama: Path, packed: Path) -> None:
    dense = load(tiny_llama)
    dense.save_pretrained(packed.with_name("shards"), max_shard_size="50KB")
    expected = source(nf4(tiny_llama))
    assert source(load(packed)) == expected
    assert source(load(packed, cls=AutoModel)) == expected
    assert source(nf4(tiny_llama, cls=AutoModel)) == expected
    assert source(nf4(packed.with_name("shards"))) == expected
    assert source(nf4(tiny_llama, dtype=torch.bfloat16)) == expected
    assert source(nf4(tiny_llama, block_size=32)) == expected
    assert source(modq.quantize_model(dense, "nf4")) == expected


def test_conv1d_weights_count_as_they_are_stored(tiny: Callable[..., Path]) -> None:
    assert source(nf4(tiny("gpt2"))) == source(modq.quantize_model(load(tiny("gpt2")), "nf4"))


def test_other_weights_are_another_source(tiny_llama: Path, other_weights: Path) -> None:
    assert source(nf4(tiny_llama)) != source(nf4(other_weights))


def test_the_hash_of_a_weight_sees_every_element_and_the_shape() -> None:
    weight = torch.randn(1030, 1030, generator=torch.Generator().manual_seed(0))  # more than one chunk
    changed = weight.clone()
    changed[-1, -1] += 1
    hashes = [hash_weight(w) for w in (weight, changed, weight.T, weight.view(515, 2060))]
    assert len(set(hashes)) == 4
    assert hash_weight(weight.bfloat16()) == hashes[0]


def test_a_merged_base_is_no_longer_of_that_source(packed: Path, adapter: Path) -> None:
    model = PeftModel.from_pretrained(load(packed), adapter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    model.merge_adapter()
    model.save_pretrained(adapter.with_name("merged"))
    record = json.loads((adapter.with_name("merged") / FILE).read_text())
    assert (record["base"]["source"], record["base"]["schemes"][0]["codes"]) == (None, None)
    model.unmerge_adapter()
    model.save_pretrained(adapter.with_name("unmerged"))
    assert (adapter.with_name("unmerged") / FILE).read_bytes() == (adapter / FILE).read_bytes()
    merged = PeftModel.from_pretrained(load(packed), adapter).merge_and_unload()
    merged.save_pretrained(adapter.with_name("base"))
    assert "source" not in load(adapter.with_name("base")).config.quantization_config.resolved


# What is accepted


def test_the_base_itself_is_accepted_in_any_form(adapter: Path, tiny_llama: Path, packed: Path) -> None:
    for base in (nf4(tiny_llama), load(packed), nf4(tiny_llama, dtype=torch.bfloat16, block_size=64)):
        if base.dtype == torch.float32:
            PeftModel.from_pretrained(base, adapter).load_adapter(adapter, "again")
        else:  # random float32 weights, rounded first, give other codes here and there
            with pytest.warns(UserWarning, match="the source weights are the same"):
                PeftModel.from_pretrained(base, adapter)


def test_a_dense_model_takes_any_adapter(adapter: Path, other_weights: Path, packed: Path) -> None:
    for dense in (load(other_weights), load(packed).dequantize()):
        loaded = PeftModel.from_pretrained(dense, adapter)  # a warning would be an error here
        assert loaded.peft_config.keys() == {"default"}
        assert not any(quantized_layers(loaded.merge_and_unload()))


def test_without_the_side_file_nothing_is_checked(adapter: Path, other_weights: Path) -> None:
    (adapter / FILE).unlink()
    loaded = PeftModel.from_pretrained(nf4(other_weights, block_size=32), adapter)
    assert loaded.peft_config.keys() == {"default"}


def test_a_trained_copy_of_a_layer_is_not_the_base(tiny_llama: Path) -> None:
    model = nf4(tiny_llama)
    expected, attention = describe_base(model), model.model.layers[0].self_attn
    copies = nn.ModuleDict({"default": copy.deepcopy(attention.q_proj)})
    attention.q_proj = nn.ModuleDict({"original_module": attention.q_proj, "modules_to_save": copies})
    assert describe_base(model) == expected


def test_a_source_that_is_not_known_is_not_compared(adapter: Path, packed: Path) -> None:
    config = json.loads((packed / "config.json").read_text())
    del config["quantization_config"]["resolved"]["source"]
    (packed / "config.json").write_text(json.dumps(config))
    PeftModel.from_pretrained(load(packed), adapter)
    changed = edited(packed, CODES, packed.with_name("changed"))
    with pytest.warns(UserWarning, match="whether the source weights are the same is not known"):
        PeftModel.from_pretrained(load(changed), adapter)


# What is refused, and how to insist


def test_other_weights_are_refused_by_both_hashes(
    adapter: Path, tiny_llama: Path, other_weights: Path
) -> None:
    base = nf4(other_weights)
    given, expected = source(base)[:16], source(nf4(tiny_llama))[:16]
    with pytest.raises(CheckpointError, match=f"have the hash {expected}…, those of this base {given}…") as e:
        PeftModel.from_pretrained(base, adapter)
    assert f"{CHECK}=warn" in str(e.value)
    assert "\n" not in str(e.value)
    assert not any("lora" in name for name, _ in base.named_modules())  # refused before it was touched


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"block_size": 32}, r"down_proj was nf4\(block_size=64.*, and is nf4\(block_size=32"),
        ({"layers": {"down_proj": {"block_size": 32}}}, "down_proj was"),
        ({"layers": {"down_proj": None}}, r"down_proj was nf4\(.*\), and is dense here"),
        ({"modules_to_not_convert": []}, r"lm_head was dense, and is nf4"),
    ],
)
def test_other_options_are_refused(
    adapter: Path, tiny_llama: Path, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        PeftModel.from_pretrained(nf4(tiny_llama, **more), adapter)


def test_every_loading_function_checks(adapter: Path, tiny_llama: Path) -> None:
    with pytest.raises(CheckpointError, match="another base"):
        adapted(nf4(tiny_llama, block_size=32)).load_adapter(adapter, "second")
    with pytest.raises(CheckpointError, match="another base"):
        nf4(tiny_llama, block_size=32).load_adapter(str(adapter))


def test_an_adapter_of_transformers_own_is_saved_and_checked_too(tiny_llama: Path, tmp_path: Path) -> None:
    model = nf4(tiny_llama)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    nf4(tiny_llama).load_adapter(str(tmp_path))
    with pytest.raises(CheckpointError, match="another base"):
        nf4(tiny_llama, block_size=32).load_adapter(str(tmp_path))


def test_the_user_may_insist(adapter: Path, other_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHECK, "warn")
    with pytest.warns(UserWarning, match="another base"):
        PeftModel.from_pretrained(nf4(other_weights), adapter)
    monkeypatch.setenv(CHECK, "off")
    PeftModel.from_pretrained(nf4(other_weights), adapter)
    monkeypatch.setenv(CHECK, "maybe")
    with pytest.raises(OptionError, match="MODQ_ADAPTER_CHECK='maybe', expected 'error', 'warn' or 'off'"):
        PeftModel.from_pretrained(nf4(other_weights), adapter)


# What only warns


def test_other_codes_of_the_same_source_warn_once(adapter: Path, packed: Path) -> None:
    base = load(edited(packed, CODES, packed.with_name("changed")))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        PeftModel.from_pretrained(base, adapter)
    said = [str(w.message) for w in caught if w.category is UserWarning]
    assert len(said) == 1
    assert "the codes of this base have the hash" in said[0]
    assert "the source weights are the same" in said[0]


def test_another_version_of_the_package_warns(adapter: Path, tiny_llama: Path) -> None:
    rewrite(adapter, lambda record: record["base"]["schemes"][0].update(version="0.0.1"))
    with pytest.warns(UserWarning, match=r"was quantized by modq-nf4 0\.0\.1, this one is by modq-nf4"):
        PeftModel.from_pretrained(nf4(tiny_llama), adapter)


# Bad files


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.pop("base"),
        lambda r: r["base"].pop("schemes"),
        lambda r: r["base"].update(modules={"layers.0": 7}),
        lambda r: r["base"].update(source=3),
        lambda r: r["base"]["schemes"][0].pop("options"),
    ],
)
def test_a_damaged_side_file_is_one_clear_line(
    adapter: Path, tiny_llama: Path, change: Callable[[Any], Any]
) -> None:
    rewrite(adapter, change)
    with pytest.raises(CheckpointError, match=r"modq\.json is damaged .*; restore it, or set .*=off") as e:
        PeftModel.from_pretrained(nf4(tiny_llama), adapter)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"schema": 1, "ba', b"\xff\xfe"])
def test_a_truncated_side_file_is_one_clear_line(adapter: Path, tiny_llama: Path, content: bytes) -> None:
    (adapter / FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"modq\.json is damaged"):
        PeftModel.from_pretrained(nf4(tiny_llama), adapter)


def test_a_side_file_of_a_later_modq_says_to_update(adapter: Path, tiny_llama: Path) -> None:
    rewrite(adapter, lambda record: record.update(schema=2, modq="9.0"))
    with pytest.raises(CheckpointError, match=r"has schema 2, written by modq 9\.0; .*: update modq"):
        PeftModel.from_pretrained(nf4(tiny_llama), adapter)


def test_codes_that_are_not_all_here_have_no_hash(packed: Path) -> None:
    layers = dict(quantized_layers(load(packed)))
    assert hash_codes(layers) is not None
    layers["model.layers.0.self_attn.q_proj"].to("meta")
    assert hash_codes(layers) is None

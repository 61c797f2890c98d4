"""A base that came in another package's format has a source too: that checkpoint's own tensors."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import modq
from modq.errors import CheckpointError
from modq.hf.foreign import TAKEOVER, save_as
from modq.hf.provenance import CHECK, hash_stored

WEIGHT = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(autouse=True)
def _taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TAKEOVER, "all")
    monkeypatch.delenv(CHECK, raising=False)


def load(folder: Path, dtype: Any = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def source(model: Any) -> str:
    value: str = model.config.quantization_config.resolved["source"]
    return value


def save_adapter(base: Any, folder: Path) -> Path:
    get_peft_model(base, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(folder)
    return folder


def changed(folder: Path, target: Path, key: str = WEIGHT) -> Path:
    """Copy a checkpoint, with the first element of one tensor changed."""
    shutil.copytree(folder, target)
    with safe_open(target / "model.safetensors", framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
    first = tensors[key].view(-1)[:1]
    first.copy_(first ^ 1)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.fixture
def quantized(tiny_llama: Path) -> Any:
    """The tiny model, quantized by modq from its dense weights."""
    return AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=modq.ModqConfig("nf4"))


@pytest.fixture
def foreign(quantized: Any, tmp_path: Path) -> Path:
    """The same codes in a checkpoint of bitsandbytes' format."""
    save_as(quantized, tmp_path / "foreign", "bitsandbytes")
    return tmp_path / "foreign"


@pytest.fixture
def adapter(foreign: Path, tmp_path: Path) -> Path:
    """An adapter over the foreign checkpoint."""
    return save_adapter(load(foreign), tmp_path / "adapter")


def test_the_source_is_the_same_in_any_dtype_and_after_saving_as_modq(foreign: Path, tmp_path: Path) -> None:
    model = load(foreign)
    kind, _, digest = source(model).partition(":")
    assert (kind, len(digest)) == ("bitsandbytes", 64)
    assert source(load(foreign, torch.bfloat16)) == source(model)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert source(load(tmp_path / "shards")) == source(model)
    assert source(load(changed(foreign, tmp_path / "other"))) != source(model)


def test_the_same_checkpoint_is_accepted_and_another_refused(
    foreign: Path, adapter: Path, tmp_path: Path
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        PeftModel.from_pretrained(load(foreign, dtype), adapter)  # a warning would be an error here
    load(foreign).save_pretrained(tmp_path / "modq")
    PeftModel.from_pretrained(load(tmp_path / "modq"), adapter)
    other = changed(foreign, tmp_path / "other")
    hashes = rf"have the hash bitsandbytes:\w{{16}}…, those of this base {source(load(other))[:29]}…"
    with pytest.raises(CheckpointError, match=hashes):
        PeftModel.from_pretrained(load(other), adapter)


def test_equal_codes_are_one_base_whoever_quantized(foreign: Path, quantized: Any, tmp_path: Path) -> None:
    """From which weights a foreign checkpoint was made nobody can tell: its codes decide, and only warn."""
    PeftModel.from_pretrained(load(foreign), save_adapter(quantized, tmp_path))
    other = load(changed(foreign, tmp_path / "other"))
    with pytest.warns(UserWarning, match="whether the source weights are the same is not known"):
        PeftModel.from_pretrained(other, tmp_path)


def test_our_own_quantization_takes_an_adapter_of_the_foreign_one(adapter: Path, quantized: Any) -> None:
    with warnings.catch_warnings(record=True) as doubts:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(quantized, adapter)
    assert "default" in loaded.peft_config
    assert [str(doubt.message) for doubt in doubts if "adapter" in str(doubt.message)] == []


def test_the_hash_of_what_is_stored_sees_names_dtypes_and_every_element() -> None:
    first = torch.arange(6, dtype=torch.uint8)
    variants = [
        {"a": first},
        {"b": first},
        {"a": first, "b": first[:0]},
        {"a": first.view(torch.int8)},
        {"a": first.view(2, 3)},
        {"a": first.flip(0)},
    ]
    assert len({hash_stored(tensors) for tensors in variants}) == len(variants)
    pair = {"a": first, "b": first.flip(0)}
    assert hash_stored(pair) == hash_stored(dict(reversed(pair.items())))

"""Whole models: quantized while loading, saved, loaded again bit for bit, trained through LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import modq
from modq.model import quantized_layers

TOKENS = {"vocab_size": 64, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
MODELS: dict[str, tuple[Any, Any]] = {
    "llama": (
        LlamaForCausalLM,
        LlamaConfig(
            **TOKENS, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.1, tie_word_embeddings=False,
        ),
    ),
    "opt": (
        OPTForCausalLM,
        OPTConfig(
            **TOKENS, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=32, word_embed_proj_dim=64, init_std=0.1,
        ),
    ),
    "bloom": (
        BloomForCausalLM,
        BloomConfig(**TOKENS, hidden_size=64, n_layer=2, n_head=4, initializer_range=0.1),
    ),
    "t5": (
        T5ForConditionalGeneration,
        T5Config(
            **TOKENS, d_model=64, d_kv=16, d_ff=88, num_layers=2, num_heads=4,
            feed_forward_proj="gated-gelu", decoder_start_token_id=0,
        ),
    ),
}  # fmt: skip
KINDS = [{"bits": 2}, {"bits": 3}, {"bits": 4, "codebook": "uniform", "rotation": "kronecker"}]


def inputs(model: Any) -> dict[str, Any]:
    ids = torch.arange(4, 20).view(2, 8)
    return {"input_ids": ids, "labels": ids}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("architecture", MODELS)
def test_a_model_is_quantized_saved_loaded_and_trained(
    architecture: str, options: dict[str, Any], tmp_path: Path
) -> None:
    cls, config = MODELS[architecture]
    auto = AutoModelForSeq2SeqLM if architecture == "t5" else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        cls(config).save_pretrained(tmp_path / "dense")
    model = auto.from_pretrained(
        tmp_path / "dense", quantization_config=modq.ModqConfig("quipsharp", **options)
    ).eval()
    assert {layer.backend for _, layer in quantized_layers(model)} == {"quipsharp"}
    model.save_pretrained(tmp_path / "packed")
    again = auto.from_pretrained(tmp_path / "packed").eval()
    left, right = model.state_dict(), again.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    with torch.no_grad():
        assert torch.equal(model(**inputs(model)).logits, again(**inputs(again)).logits)
    lora = LoraConfig(r=4, target_modules="all-linear")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        trained = get_peft_model(again, lora).eval()  # without dropout, so that the losses compare
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = trained(**inputs(trained)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    base = dict(quantized_layers(trained))
    for name, layer in quantized_layers(model):
        same = next(dict(other.named_packed()) for key, other in base.items() if name in key)
        assert all(torch.equal(tensor, same[key]) for key, tensor in layer.named_packed())

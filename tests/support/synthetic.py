"""Writes models of random weights that are larger than what a test may hold in memory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig


def llama(hidden: int, intermediate: int, layers: int, vocabulary: int, dtype: str) -> LlamaConfig:
    """Return the config of a Llama with heads of 64 channels and 4 key-value heads."""
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=4,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
        dtype=dtype,
        architectures=["LlamaForCausalLM"],
    )


def write_dense(folder: Path, config: LlamaConfig) -> None:
    """Write a random model a layer a shard: it is never in memory as a whole."""
    generator = torch.Generator().manual_seed(0)
    hidden, wide = config.hidden_size, config.intermediate_size
    kv = config.head_dim * config.num_key_value_heads
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    shards = [
        {f"model.layers.{i}.{name}.weight": shape for name, shape in shapes.items()}
        for i in range(config.num_hidden_layers)
    ]
    table = (config.vocab_size, hidden)
    shards.append(
        {"model.embed_tokens.weight": table, "model.norm.weight": (hidden,), "lm_head.weight": table}
    )
    places = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {
            name: torch.empty(shape, dtype=config.dtype).normal_(0, 0.02, generator=generator)
            for name, shape in shard.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config.save_pretrained(folder)

"""Writes checkpoints as QuIP#'s authors publish them, and the dense models that they stand for.

The dense weights follow from the codes by the formulas of the format, in float64, with tables and rotations
made here. Only the codes come from modq.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import modq

CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.1, tie_word_embeddings=False,
    pad_token_id=0, eos_token_id=1, bos_token_id=2,
)  # fmt: skip
MODULES = {
    "self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "self_attn.o_proj": ("o_proj",),
    "mlp.upgate_proj": ("up_proj", "gate_proj"),
    "mlp.down_proj": ("down_proj",),
}
KINDS = {7: ("E8P12", 1, 2, 4), 17: ("E8P12RVQ4B", 1, 4, 2), 18: ("E8P12RVQ3B", 0, 3, 8 / 3)}


@cache
def absolute_rows() -> Tensor:
    """The 256 rows of the table of absolute values."""
    short = [row for row in product((0.5, 1.5, 2.5), repeat=8) if sum(x * x for x in row) <= 10]
    halves = (
        "123 023 013 012 367 357 347 356 346 345 267 257 247 256 246 "
        "245 167 157 147 156 146 045 067 057 047 056 046 014 237"
    )
    long = [[0.5 if str(i) in where else 1.5 for i in range(8)] for where in halves.split()]
    return torch.tensor([*short, *long], dtype=torch.float64)


@cache
def point(code: int) -> Tensor:
    """The 8 numbers that a code of 16 bits stands for."""
    rows = absolute_rows()
    v, signs = rows[code >> 8].clone(), code & 255
    odd = signs.bit_count() & 1
    negative_last = int(v.sum()) % 2
    for bit, element in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        if (signs ^ odd) >> bit & 1:
            v[element] = -v[element]
    if negative_last:
        v[7] = -v[7]
    return v + (-0.25 if odd else 0.25)


def one_bit_points() -> Tensor:
    """The 256 points of the second stage at 3 bits."""
    whole = [p for p in product((-1, 0, 1), repeat=8) if sum(p) % 2 == 0 and sum(x * x for x in p) <= 2]
    half = [p for p in product((-0.5, 0.5), repeat=8) if sum(p) % 2 == 0]
    axes = [[s * (i == k) for i in range(8)] for s, n in ((2, 8), (-2, 7)) for k in range(n)]
    return torch.tensor([*whole, *half, *axes], dtype=torch.float64)


def rotation(size: int) -> Tensor:
    """U of the sizes used here: 2^k, or 12 · 2^k by Paley's first construction."""
    block = torch.ones(1, 1, dtype=torch.float64)
    if size % 12 == 0:
        squares = {i * i % 11 for i in range(1, 11)}
        block = torch.ones(12, 12, dtype=torch.float64)
        block[0, 1:] = -1
        for i, j in product(range(11), repeat=2):
            block[1 + i, 1 + j] = 1 if i == j or (i - j) % 11 in squares else -1
    fast = torch.ones(1, 1, dtype=torch.float64)
    while len(block) * len(fast) < size:
        fast = torch.kron(torch.tensor([[1, 1], [1, -1]], dtype=torch.float64), fast)
    return torch.kron(block, fast) / math.sqrt(size)


# The encoder


def pack_tiles(codes: Tensor) -> Tensor:
    """Codes of 16 bits (m, n/8) as int64 (m, n/32)."""
    m, runs = codes.shape
    words = []
    for tile, column, lane in product(range(m // 16), range(runs // 8), range(32)):
        word = 0
        for slot in range(4):
            code = int(codes[16 * tile + 2 * (lane // 4) + slot % 2, 8 * column + 2 * (lane % 4) + slot // 2])
            word |= code >> 8 << 8 * slot
            word |= sum((code >> bit & 1) << 32 + 4 * bit + slot for bit in range(8))
        words.append(word - (1 << 64) if word >> 63 else word)
    return torch.tensor(words).view(m, runs // 4)


def encode(weights: list[Tensor], number: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Quantize linears as one module of theirs; return its tensors and the matrix that they stand for."""
    _, _, bits, _ = KINDS[number]
    rms = [float(weight.square().mean().sqrt()) if len(weights) > 1 else 1.0 for weight in weights]
    stacked = torch.cat([weight / each for weight, each in zip(weights, rms, strict=True)])
    made = modq.quantize(stacked, "quipsharp", bits=bits).tensors
    g = torch.Generator().manual_seed(seed)
    tuned = {
        name: (made[key].float() * (1 + 0.1 * torch.randn(made[key].shape, generator=g))).half()
        for name, key in (("SU", "input_scales"), ("SV", "output_scales"))
    }
    first = made["codes"].long() & 0xFFFF
    points = torch.stack([point(int(code)) for code in first.flatten()]).view(len(stacked), -1)
    words = [pack_tiles(first)]
    if bits == 4:
        second = made["residual"].long() & 0xFFFF
        points += torch.stack([point(int(code)) for code in second.flatten()]).view_as(points) / 3.45
        words.append(pack_tiles(second))
    elif bits == 3:
        points += one_bit_points()[made["residual"].long()].view_as(points) / 2.04
        words.append(made["residual"].contiguous().view(torch.int64))  # bytes, the first the lowest
    tensors = {
        **tuned,
        "Qidxs": torch.cat(words, dim=1),
        "codebook_id": torch.tensor(number),
        "Wscale": made["scale"].reshape(()).clone(),
    }
    if len(weights) > 1:
        tensors["fuse_scales"] = torch.tensor(rms)
    factors = torch.cat([torch.full((len(w),), r).float() for w, r in zip(weights, rms, strict=True)])
    outer, inner = rotation(len(stacked)), rotation(stacked.shape[1])
    left = tuned["SV"].double() * factors.double() * tensors["Wscale"].double()
    return tensors, left[:, None] * (outer @ points @ inner.T) * tuned["SU"].double()


def write(folder: Path, tensors: Mapping[str, Tensor], number: int, **other: Any) -> Path:
    """Write a checkpoint as theirs look, in two shards that cut through the modules.

    `other` are values of quip_params that differ, or of config.json.
    """
    name, version, _, packsz = KINDS[number]
    quip_params = {
        "codebook": name, "codebook_version": version, "codesz": 8, "fused": True, "idx_dtype": "torch.int64",
        "lora_rank": 0, "model_version": 1, "outlier_channel_split": False, "packsz": packsz,
        "rescale_WH": False, "resid_scale_override": -1,
    }  # fmt: skip
    config = {**CONFIG.to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "float16"}
    for key, value in other.items():
        (config if key in config else quip_params)[key] = value
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**config, "quip_params": quip_params}))
    files = {key: f"model-0000{1 + key.endswith('SV')}-of-00002.safetensors" for key in tensors}
    for file in set(files.values()):
        save_file({k: t for k, t in tensors.items() if files[k] == file}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def make(folder: Path, number: int) -> LlamaForCausalLM:
    """Write a small random Llama with this codebook, and return the float64 model that it stands for."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(number)
        dense = LlamaForCausalLM(CONFIG)
        for name, parameter in dense.named_parameters():
            if "norm" in name:
                parameter.data += 0.1 * torch.randn_like(parameter)
    state = {key: t.half() for key, t in dense.state_dict().items()}
    exact = {key: t.double() for key, t in state.items()}
    for block, (module, parts) in product(range(2), MODULES.items()):
        name = f"model.layers.{block}.{module}"
        names = [f"{name.rpartition('.')[0]}.{part}.weight" for part in parts]
        weights = [state.pop(part).float() for part in names]
        tensors, matrix = encode(weights, number, seed=block)
        state |= {f"{name}.{key}": t for key, t in tensors.items()}
        exact |= dict(zip(names, matrix.split([len(w) for w in weights]), strict=True))
    write(folder, state, number)
    dense = dense.double()
    dense.load_state_dict(exact)
    return dense.eval()

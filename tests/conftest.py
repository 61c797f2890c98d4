"""Tiny random models of the architectures that users bring, saved once a session, with a tokenizer each."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

WORDS = [
    "the",
    "union",
    "is",
    "strong",
    "and",
    "we",
    "will",
    "build",
    "a",
    "fair",
    "future",
    "for",
    "all",
    "of",
    "us",
]
SPECIAL = ["<pad>", "</s>", "<s>", "<unk>"]
VOCAB = 64

# No two dimensions that meet in a linear are equal, save for the square ones that the architecture has: a
# transposed weight does not go unseen. Large initial values make the logits tell one weight from another.
_TOKENS = {"vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
_LLAMA: dict[str, Any] = {
    **_TOKENS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}

ARCHITECTURES: dict[str, tuple[type[PreTrainedModel], Callable[[], Any]]] = {
    "llama": (LlamaForCausalLM, lambda: LlamaConfig(**_LLAMA)),
    "mistral": (MistralForCausalLM, lambda: MistralConfig(**_LLAMA, head_dim=16)),
    "qwen2": (Qwen2ForCausalLM, lambda: Qwen2Config(**_LLAMA)),
    "qwen3": (Qwen3ForCausalLM, lambda: Qwen3Config(**_LLAMA, head_dim=16)),
    "gemma": (
        GemmaForCausalLM,
        lambda: GemmaConfig(**{**_LLAMA, "tie_word_embeddings": True}, head_dim=16),
    ),
    "opt": (
        OPTForCausalLM,
        lambda: OPTConfig(
            **_TOKENS,
            hidden_size=64,
            ffn_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            word_embed_proj_dim=64,
            init_std=0.1,
        ),
    ),
    "bloom": (
        BloomForCausalLM,
        lambda: BloomConfig(**_TOKENS, hidden_size=64, n_layer=2, n_head=4, initializer_range=0.1),
    ),
    "gpt2": (
        GPT2LMHeadModel,
        lambda: GPT2Config(**_TOKENS, n_embd=64, n_layer=2, n_head=4, n_positions=128, initializer_range=0.1),
    ),
    "t5": (
        T5ForConditionalGeneration,
        lambda: T5Config(
            **_TOKENS,
            d_model=64,
            d_kv=16,
            d_ff=96,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
        ),
    ),
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reaches for the hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny("gemma", torch.bfloat16)`: the folder of a saved random model; never write into it."""
    folders: dict[tuple[str, torch.dtype], Path] = {}

    def folder(architecture: str, dtype: torch.dtype = torch.float32) -> Path:
        key = architecture, dtype
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp(architecture)
            random_model(architecture, dtype).save_pretrained(folders[key])
            tokenizer().save_pretrained(folders[key])
        return folders[key]

    return folder


@pytest.fixture(scope="session")
def tiny_llama(tiny: Callable[..., Path]) -> Path:
    """The folder of a float32 Llama with grouped queries and an untied head, and of a tokenizer."""
    return tiny("llama")


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Sentences of the tokenizer's words, each cut from one cycle, so that there is something to learn."""
    return [" ".join(WORDS[(start + 4 * i) % len(WORDS)] for i in range(24)) for start in range(len(WORDS))]


@pytest.fixture(scope="session")
def data(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sentences as a JSONL file, to train on or to calibrate with."""
    path = tmp_path_factory.mktemp("data") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def random_model(architecture: str, dtype: torch.dtype) -> PreTrainedModel:
    """Make a model whose every parameter is random, norms and biases too: a lost one shows."""
    cls, config = ARCHITECTURES[architecture]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(config())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.to(dtype)


def tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of whole words."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *dict.fromkeys(WORDS)])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )


@pytest.fixture
def cells_in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run the cells of benchmarks as function calls: five processes would import torch five times."""
    runner = importlib.import_module("benchmarks.runner")

    def call(cell: Any, folder: Path, timeout: float) -> Any:
        measure = importlib.import_module(cell.module).main
        return json.loads(json.dumps(measure(json.loads(json.dumps(dict(cell.settings))))))

    monkeypatch.setattr(runner, "run_cell", call)
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)

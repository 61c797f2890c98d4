"""Training through modq's nf4 against training through bitsandbytes: one seed, one recipe, one curve.

bitsandbytes trains before it sees a forward without gradients: on some CPUs such a forward repacks its
weights in place, and gradients are zero from then on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from modq.demo.texts import split_speeches, token_windows
from modq.demo.weights import demo_model
from modq.hf import ModqConfig

pytest.importorskip("bitsandbytes", reason="bitsandbytes is the peer that this compares with")

pytestmark = [
    # peft 0.21 asks transformers 5.23 by the old name, at every attachment
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

STEPS = 30
EPOCHS = 3


OURS = ModqConfig("nf4", double_quant=True)


def theirs(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def adapted(folder: Path, config: Any, dtype: torch.dtype) -> Any:
    """Make the model with LoRA on every linear, the same adapter whatever is below it."""
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_peft_model(base, LoraConfig(r=8, target_modules="all-linear")).train()


def curve(
    folder: Path, config: Any, dtype: torch.dtype, batches: Sequence[Tensor], rate: float
) -> list[float]:
    """Train on the batches in order, `EPOCHS` times; return the loss of each step."""
    model = adapted(folder, config, dtype)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)
    losses = []
    for batch in [*batches] * EPOCHS:
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert len(losses) == STEPS
    return losses


def largest_difference(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))


def assert_same_training(folder: Path, dtype: torch.dtype, batches: Sequence[Tensor], rate: float) -> None:
    ours, reference = (curve(folder, config, dtype, batches, rate) for config in (OURS, theirs(dtype)))
    epoch = len(batches)
    first, last = sum(reference[:epoch]) / epoch, sum(reference[-epoch:]) / epoch
    difference = largest_difference(ours, reference)
    print(f"largest difference {difference:.4%} of the loss, which fell from {first:.4f} to {last:.4f}")
    assert last <= 0.95 * first  # over the same batches: no luck of the draw
    assert difference <= 0.01


@pytest.fixture
def batches(tiny_llama: Path, texts: list[str]) -> tuple[Tensor, ...]:
    """Ten batches, small enough that the loss is still falling after `STEPS`."""
    ids = AutoTokenizer.from_pretrained(tiny_llama)(texts, return_tensors="pt").input_ids
    return ids[:10].split(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_training_follows_bitsandbytes_step_by_step(dtype, tiny_llama, batches):
    assert_same_training(tiny_llama, dtype, batches, rate=5e-3)


def test_the_comparison_would_notice_another_quantizer(tiny_llama, batches):
    nf4, fp4 = (
        curve(tiny_llama, ModqConfig("nf4", quant_type=kind), torch.float32, batches, 5e-3)
        for kind in ("nf4", "fp4")
    )
    assert largest_difference(fp4, nf4) > 0.02


@pytest.mark.slow  # minutes
def test_training_of_a_real_model_follows_bitsandbytes_step_by_step():
    """SmolLM2-135M, rescaled off its 4-bit grid, on annual messages."""
    folder = demo_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    windows = token_windows(tokenizer, split_speeches().train, window=128, max_tokens=20 * 128)
    assert_same_training(folder, torch.float32, windows.split(2), rate=5e-4)

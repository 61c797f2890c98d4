"""The training that every system gets: one LoRA, one loss, one optimizer, a plain loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, get_linear_schedule_with_warmup

from modq.demo.texts import split_speeches, token_windows
from modq.train.models import load_tokenizer

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""By name: PEFT's "all-linear" does not see the layers of hqq and gptqmodel."""

WARM_UP = 0.1
"""The share of the steps over which the rate rises to what is given; then it falls to zero, linearly."""


def training_windows(model: Path, count: int, tokens: int) -> Tensor:
    """Cut one window out of each of the demo's first training speeches, or more if they do not suffice.

    A model without a tokenizer was never trained (see random_llama.py): it gets random ids from a fixed seed,
    for there is nothing that it could learn, and a step takes as long on them.
    """
    if not has_tokenizer(model):
        vocabulary = AutoConfig.from_pretrained(str(model)).vocab_size
        return torch.randint(vocabulary, (count, tokens), generator=torch.Generator().manual_seed(0))
    speeches = split_speeches().train[:count]
    return token_windows(load_tokenizer(str(model)), speeches, tokens, count * tokens)


def has_tokenizer(model: Path) -> bool:
    """Tell whether a model's folder holds a file of a tokenizer."""
    return any(model.glob("tokenizer*"))


def add_lora(model: Any, seed: int, *, checkpointing: bool = False) -> Any:
    """Put LoRA of rank 8 on every linear but the head. The same seed gives every system the same factors."""
    model.config.use_cache = False
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(seed)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=LINEARS, task_type="CAUSAL_LM")
    return get_peft_model(model, lora).train()


@dataclass(slots=True)
class Steps:
    """What each step of a training took and gave."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def train(
    model: Any, batches: Sequence[Any], loss_of: Callable[[Any, Any], Tensor], learning_rate: float
) -> Steps:
    """Train the adapter, one step of AdamW a batch.

    Args:
        model: what `add_lora` returned.
        batches: anything that `loss_of` takes.
        loss_of: (model, batch) -> the loss.
        learning_rate: the highest, reached after WARM_UP.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    warm_up = round(WARM_UP * len(batches))
    schedule = get_linear_schedule_with_warmup(optimizer, warm_up, len(batches))
    steps = Steps()
    for batch in batches:
        started = time.perf_counter()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        steps.losses.append(loss.item())
        steps.seconds.append(time.perf_counter() - started)
    return steps

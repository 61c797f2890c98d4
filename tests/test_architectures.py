"""Every backend on the architectures that differ most: quantized, saved, loaded bit for bit, trained (S8)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import modq
from modq.errors import CheckpointError
from modq.model import quantized_layers

BACKENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "nf4": ("nf4", {}),
    "hqq-3": ("hqq", {"bits": 3, "group_size": 32}),
    "hqq-4-axis-0": ("hqq", {"bits": 4, "group_size": 32, "axis": 0}),
    "optq-3": ("optq", {"bits": 3, "group_size": 32, "symmetric": False}),
    "optq-4-sorted": ("optq", {"bits": 4, "group_size": 32, "act_order": "full"}),
    "quipsharp-2": ("quipsharp", {"bits": 2}),
    "quip-4": ("quipsharp", {"bits": 4, "codebook": "uniform", "rotation": "kronecker"}),
}
CALIBRATED = ("optq-3", "optq-4-sorted", "quipsharp-2")


def auto(folder: Path) -> Any:
    seq2seq = AutoConfig.from_pretrained(folder).is_encoder_decoder
    return AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM


def inputs() -> dict[str, torch.Tensor]:
    ids = torch.arange(4, 20).view(2, 8)
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize("architecture", ["llama", "opt", "bloom", "t5"])
def test_a_model_is_quantized_saved_loaded_and_trained(
    architecture: str, kind: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    dense, (backend, options) = tiny(architecture), BACKENDS[kind]
    if kind in CALIBRATED:
        model = auto(dense).from_pretrained(dense)
        modq.quantize_model(model, backend, calibration=[inputs()], **options)
    else:
        config = modq.ModqConfig(backend, **options)
        model = auto(dense).from_pretrained(dense, quantization_config=config)
    assert {layer.backend for _, layer in quantized_layers(model.eval())} == {backend}
    model.save_pretrained(tmp_path / "packed")
    again = auto(dense).from_pretrained(tmp_path / "packed").eval()
    left, right = model.state_dict(), again.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    with torch.no_grad():
        assert torch.equal(model(**inputs()).logits, again(**inputs()).logits)
    losses = train(again)
    assert losses[-1] < losses[0] - 0.1
    trained = {name.removeprefix("base_model.model."): tensor for name, tensor in again.state_dict().items()}
    for name, layer in quantized_layers(model):
        for key, tensor in layer.named_packed():
            found = trained.get(f"{name}.base_layer.{key}", trained.get(f"{name}.{key}"))
            assert found is not None, f"{name}.{key}"
            assert torch.equal(found, tensor), f"{name}.{key}"


@pytest.mark.parametrize("backend", sorted({backend for backend, _ in BACKENDS.values()}))
def test_a_format_of_the_future_is_refused(backend: str) -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    qweight = modq.quantize(weight, backend, modq.Calibration(hessian=torch.eye(64), samples=64))
    with pytest.raises(CheckpointError, match="format 2, expected 1"):
        modq.dequantize(replace(qweight, format_version=2))


def train(model: Any, steps: int = 6) -> list[float]:
    """Train LoRA on one batch; dropout is off, so that the losses compare."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        trained = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).eval()
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = trained(**inputs()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses

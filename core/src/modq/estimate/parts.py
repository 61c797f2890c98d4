"""The parts of the memory that training takes: what the model holds, and what a step adds to it."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from modq.errors import CheckpointError
from modq.estimate.process import process_bytes
from modq.estimate.step import check_targets, run_step
from modq.kernels.dispatch import DECODED_ELEMENTS
from modq.linear import QuantLinear
from modq.materialize import BLOCK_ELEMENTS
from modq.model import Recipe, plan_layers, quantized_layers
from modq.registry import describe_backend
from modq.train.models import read_config, refuse_quantized

FAULT_AROUND = 1 << 16
"""Bytes of a mapped file that become resident when one byte of them is read: Linux maps 16 pages at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What is trained and how.

    Attributes:
        batch: examples a batch.
        length: tokens an example.
        r: the rank of the LoRA adapter.
        target_modules: as PEFT takes it.
        optim: an optimizer by its name in transformers.
        gradient_checkpointing: whether activations are computed twice instead of kept.
        adapter_dtype: of the adapter, its gradients and the optimizer's states.
        trainer: whether it is as `modq finetune` trains, with TRL: logits in tiles, autocast, more imports.
            False stands for a plain loop over `model(input_ids=ids, labels=ids).loss`.
    """

    batch: int = 4
    length: int = 512
    r: int = 8
    target_modules: str | tuple[str, ...] = "all-linear"
    optim: str = "adamw_torch"
    gradient_checkpointing: bool = True
    adapter_dtype: str = "float32"
    trainer: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Bytes that are resident at the peak of a training step, by part.

    Attributes:
        codes: the largest packed tensor of each quantized linear.
        scales: its other packed tensors.
        dense: embeddings, head, norms, and linears that stay dense; of an embedding table that stays in its
            mapped file, the rows that a batch reads.
        adapter: its weights.
        gradients: those of the adapter.
        optimizer: its states.
        activations: what autograd keeps for the backward pass, and what passes through.
        logits: of these, what is as wide as the vocabulary, or a tile of it.
        casting: what loading takes above all that a step takes, where dense tensors change their dtype: both
            are resident then.
        workspace: the block of dense weights that a product without a fused kernel decodes at a time.
        process: the interpreter and the libraries, see `process_bytes`.
    """

    codes: int
    scales: int
    dense: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    casting: int
    workspace: int
    process: int

    @property
    def parts(self) -> dict[str, int]:
        """The bytes of each part, by its name."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(self.parts.values())


def estimate(
    source: str,
    training: Training | None = None,
    *,
    backend: str | None = None,
    options: Mapping[str, Any] | None = None,
    dtype: str = "auto",
) -> Estimate:
    """Predict the peak of the resident memory while an adapter is trained on the CPU.

    Args:
        source: a folder with a config.json, or the name of a model on the hub; no weight is read.
        training: what is trained and how; by default as `modq finetune` does.
        backend: what a dense model would be quantized by; None takes the checkpoint as it is.
        options: the backend's options.
        dtype: of what is not quantized: "auto" (as stored), "bfloat16", "float16" or "float32".

    Raises:
        CheckpointError: if the config cannot be read, or the checkpoint is in a format of another package.
        BackendError, OptionError, ShapeError: as loading or training would.
    """
    training = training or Training()
    config = read_config(source)
    if backend is not None:
        refuse_quantized(source, config)
    stored = config.dtype or torch.float32
    wanted = stored if dtype == "auto" else getattr(torch, dtype)
    model = _empty_model(source, config, wanted)
    if backend is not None:
        _plan(model, Recipe(backend, options or {}), wanted)
    packed = _packed(model)
    dense = _dense(model, training.batch * training.length, mapped=wanted == stored)
    check_targets(model, training.target_modules)  # before what takes seconds
    with ThreadPoolExecutor(1) as pool:  # two waits of much the same length, in two processes
        process = pool.submit(process_bytes, training.trainer)
        step = run_step(model, training)
    item = wanted.itemsize + torch.float32.itemsize  # a block, and what decoding it in plain torch takes
    block = max(DECODED_ELEMENTS * torch.float32.itemsize, BLOCK_ELEMENTS * item)
    found = Estimate(
        codes=sum(max(sizes) for sizes in packed),
        scales=sum(sum(sizes) - max(sizes) for sizes in packed),
        dense=dense,
        adapter=step.adapter,
        gradients=step.gradients,
        optimizer=step.optimizer,
        activations=step.activations,
        logits=step.logits,
        casting=0,
        workspace=block if packed else 0,
        process=process.result(),
    )
    if wanted == stored:
        return found
    loading = found.process + dense + dense * stored.itemsize // wanted.itemsize
    return replace(found, casting=max(0, loading - found.total))


def _empty_model(source: str, config: Any, dtype: torch.dtype) -> Any:
    """Make the model on meta, with the quantized layers that its checkpoint records."""
    from transformers import AutoModelForCausalLM

    from modq.hf.config import ModqConfig
    from modq.hf.foreign import stored_config
    from modq.hf.quantizer import expect_packed

    recorded = stored_config(config)
    if recorded is not None and recorded["quant_method"] != "modq":
        method = recorded["quant_method"]
        raise CheckpointError(
            f"{source!r} is quantized by {method!r}, expected a dense model or one that modq saved; "
            "give the dense model with --backend"
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if recorded is not None:
        expect_packed(model, ModqConfig.from_dict(recorded), dtype)
    return model


def _plan(model: Any, recipe: Recipe, dtype: torch.dtype) -> None:
    """Put quantized layers in the places where loading would."""
    from modq.hf.quantizer import default_skips

    recipe.check()
    for name, scheme in plan_layers(model, recipe, default_skips(model, recipe)).items():
        layer = QuantLinear.like(model.get_submodule(name), scheme.backend, scheme.options, dtype=dtype)
        layer.allocate(describe_backend(scheme.backend).format_versions[-1], {})
        model.set_submodule(name, layer)


def _packed(model: nn.Module) -> list[list[int]]:
    """Return the bytes of each layer's packed tensors; what layers share counts for the first."""
    seen: set[int] = set()
    found = []
    for _, layer in quantized_layers(model):
        own = [tensor for _, tensor in layer.named_packed() if id(tensor) not in seen]
        seen |= {id(tensor) for tensor in own}
        found += [[tensor.nbytes for tensor in own]] if own else []
    return found


def _dense(model: Any, tokens: int, *, mapped: bool) -> int:
    """Return the bytes of all parameters and buffers that are not packed."""
    packed = {id(tensor) for _, layer in quantized_layers(model) for _, tensor in layer.named_packed()}
    held = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in packed}
    total = sum(int(tensor.nbytes) for tensor in held.values())
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not (mapped and isinstance(table, nn.Embedding)) or (head is not None and head.weight is table.weight):
        return total
    row = max(FAULT_AROUND, table.embedding_dim * table.weight.itemsize)
    return total - table.weight.nbytes + min(table.weight.nbytes, tokens * row)

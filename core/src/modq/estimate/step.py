"""Runs one training step on tensors without content, and counts what would be in memory at its peak.

FakeTensors have shape, dtype and strides, and go through the very code that trains: the model of
transformers, PEFT's layers, autograd, checkpointing, the optimizer. A dispatch mode sees each tensor that
appears, and a finalizer on its storage sees it go. The alternative, a formula of what each kind of layer
saves, would have to be right for every architecture, and to follow each change of these libraries.

What an opaque op (a quantized product) uses inside is not seen: that is `Estimate.workspace`.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from modq.errors import OptionError

if TYPE_CHECKING:
    from modq.estimate.parts import Training


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Bytes at the peak of a step, of a training that is under way."""

    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int


def run_step(model: Any, training: Training) -> Step:
    """Put an adapter on `model` and train it for a step.

    Args:
        model: of transformers, on meta; it is changed, and of no use afterwards.
        training: how.

    Raises:
        OptionError: if the model or the libraries do not know a name in `training`.
    """
    backbone, loss_of = model.base_model, _loss_of(model, training)
    model = _add_adapter(model, training)
    mode = FakeTensorMode()
    with mode:
        _fake(model, mode, getattr(torch, training.adapter_dtype))
        ids = torch.zeros(training.batch, training.length, dtype=torch.long)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    live = _Live([*model.parameters(), *model.buffers(), ids])
    backbone.register_forward_hook(live.logits_begin)
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(lambda p: live.move(p.grad, "gradients"))
    with mode, live:
        loss_of(model, ids).backward()  # type: ignore[no-untyped-call]  # torch's
        backward, gradients = live.peak, live.now["gradients"]
        live.kind, live.peak = "optimizer", Counter()
        optimizer = _optimizer(trained, training.optim)  # a name: its states go when it goes
        optimizer.step()
    states, stepping = live.now["optimizer"], live.peak
    backward["optimizer"] = states
    peak = max(
        backward,
        Counter({"gradients": gradients, "optimizer": stepping["optimizer"]}),
        key=lambda parts: parts.total(),
    )
    return Step(
        adapter=sum(parameter.nbytes for parameter in trained),
        gradients=peak["gradients"],
        optimizer=peak["optimizer"],
        activations=peak["activations"],
        logits=peak["logits"],
    )


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Counts the bytes that are alive, by kind, and keeps the counts of the moment with the most.

    Attributes:
        kind: of what appears from now on.
        now: bytes by kind.
        peak: `now` at its largest sum.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.kind = "activations"
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._kinds = {tensor.untyped_storage()._cdata: "" for tensor in known}  # of those that live
        self._held = [tensor.untyped_storage() for tensor in known]  # their addresses are not given anew

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do what is asked, and count what it gives."""
        result = func(*args, **(kwargs or {}))
        for value in pytree.tree_leaves(result):
            if isinstance(value, Tensor):
                self._count(value)
        return result

    def move(self, tensor: Tensor | None, kind: str) -> None:
        """Count this tensor's bytes as of another kind from now on."""
        assert tensor is not None
        storage = tensor.untyped_storage()
        was = self._kinds.get(storage._cdata)
        if was:
            self.now[was] -= storage.nbytes()
            self.now[kind] += storage.nbytes()
            self._kinds[storage._cdata] = kind

    def logits_begin(self, module: nn.Module, args: Any, output: Any) -> None:
        """Count as logits what appears from the last hidden states on until their gradient is there."""
        self.kind = "logits"
        output[0].register_hook(self._logits_end)

    def _logits_end(self, gradient: Tensor) -> None:
        self.kind = "activations"

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._kinds:
            return
        self._kinds[key] = self.kind
        self.now[self.kind] += nbytes
        if self.now.total() > self.peak.total():
            self.peak = self.now.copy()
        weakref.finalize(storage, self._drop, key, nbytes)

    def _drop(self, key: int, nbytes: int) -> None:
        self.now[self._kinds.pop(key)] -= nbytes


def _fake(model: nn.Module, mode: FakeTensorMode, adapter_dtype: torch.dtype) -> None:
    """Replace what a model on meta has by fake tensors that pass for ones on the CPU; inside `mode`."""
    made: dict[int, Tensor] = {}

    def like(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            dtype = adapter_dtype if tensor.requires_grad else tensor.dtype
            made[id(tensor)] = torch.empty(tensor.shape, dtype=dtype, device="cpu")
        return made[id(tensor)]

    parameters: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = nn.Parameter(like(parameter), requires_grad=parameter.requires_grad)
                module._parameters[name] = parameters.setdefault(id(parameter), fake)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else like(buffer)


def check_targets(model: nn.Module, target_modules: str | tuple[str, ...]) -> None:
    """Raise an OptionError if a name of `target_modules` is no linear's."""
    linears = {
        name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    names = () if isinstance(target_modules, str) else target_modules
    if unknown := sorted(set(names) - linears):
        has = ", ".join(sorted(linears))
        raise OptionError(f"target_modules: the model has no linear {', '.join(unknown)}; it has {has}")


def _add_adapter(model: Any, training: Training) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = training.target_modules
    lora = LoraConfig(
        r=training.r,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    model.config.use_cache = False
    model.requires_grad_(False)
    if training.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if training.trainer:
            model.enable_input_require_grads()
    return get_peft_model(model, lora).train()


def _loss_of(model: Any, training: Training) -> Callable[[Any, Tensor], Tensor]:
    """Return what gives the loss of a batch of token ids, as the training does it."""
    if not training.trainer:
        return lambda model, ids: model(input_ids=ids, labels=ids).loss
    from modq.train.sft import fused_head, small_tiles

    fused_head(model)
    mixed = model.dtype in (torch.bfloat16, torch.float16)

    def loss(model: Any, ids: Tensor) -> Tensor:
        autocast: AbstractContextManager[Any] = (
            torch.autocast("cpu", dtype=base_dtype) if mixed else nullcontext()
        )
        with small_tiles(), autocast:
            found: Tensor = model(input_ids=ids, labels=ids, fused_lm_head=True).loss
        return found

    base_dtype = model.dtype
    return loss


def _optimizer(trained: list[nn.Parameter], name: str) -> Any:
    """Make the optimizer that transformers makes of this name."""
    from transformers import Trainer, TrainingArguments

    try:
        arguments = TrainingArguments(output_dir="unused", optim=name, use_cpu=True, report_to="none")
        cls, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
        return cls(trained, **settings)
    except Exception as error:
        reason = str(error).strip().splitlines()[:1]
        raise OptionError(
            f"optim={name!r} cannot be made here: {' '.join(reason)}; try adamw_torch"
        ) from error

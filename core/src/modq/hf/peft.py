"""What PEFT needs beside `QuantLinear.weight`: exact unmerges, and to know that the model is quantized.

PEFT merges by adding a delta to the weight, one for each adapter, and unmerges by subtracting it. On a
quantized weight each step rounds to the grid, so several adapters would round several times and subtracting
does not lead back. Here a merge writes to a dense draft that is quantized once at its end. The tensors from
before the merge are few and already there: each tuner layer over a QuantLinear keeps them while it is merged
and puts them back when it is not. They go when the tuner layer goes, as in `merge_and_unload`. And a merge
that one layer's backend would refuse is refused before any layer has changed.

`prepare_model_for_kbit_training` switches gradient checkpointing on for a list of quantization methods that
it knows. A script that relies on it would run out of memory on any other, so it does for modq's models too.

And an adapter is saved with a side file that says what base it was trained on, and checked against it when it
is loaded, by PEFT's functions and by those of transformers: see `modq.hf.provenance`. Its card gets a section
on that base, see `modq.hf.card`.

`modules_to_save` trains a module whole, in a copy. Nothing of a packed copy can be trained, so the copy of a
quantized layer is the dense layer that it stands for.

LoRA over a quantized layer runs as one autograd node that keeps less: see `modq.lora`, and `modq.hf.fused`
for what it covers. `fuse_lora(False)` or MODQ_FUSED_LORA=0 turns that off.

All this wraps functions of PEFT once, when `peft` has been imported; other models are untouched. The
alternatives looked worse: to tell an unmerge from its values is a guess, a class a tuner is what modq exists
to avoid, and to pass for another quantization method brings that method's special cases.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftMixedModel, PeftModel
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.peft import PeftAdapterMixin

from modq.errors import CheckpointError
from modq.hf.card import start_card, write_adapter_card
from modq.hf.config import is_original
from modq.hf.fused import fused_forward, switch
from modq.hf.provenance import check_adapter, save_base
from modq.hf.quantizer import dense_layer
from modq.hf.wrap import wrap
from modq.linear import QuantLinear
from modq.model import quantized_layers
from modq.spec import QuantizedWeight


def wrap_peft() -> None:
    """Wrap the tuner classes that exist now; what is wrapped already stays as it is."""
    for cls in _subclasses(BaseTunerLayer):
        wrap(cls, "merge", _remembering)
        wrap(cls, "unmerge", _restoring)
    for method in ("merge_adapter", "_unload_and_optionally_merge"):
        wrap(BaseTuner, method, _checking_first)
    for namespace in ("peft", "peft.utils", "peft.utils.other"):
        wrap(sys.modules[namespace], "prepare_model_for_kbit_training", _checkpointing)
    wrap(ModulesToSaveWrapper, "update", _copying_dense)
    for loader in (PeftModel, PeftMixedModel):
        wrap(loader, "from_pretrained", _checking_adapter)
        wrap(loader, "load_adapter", _checking_adapter)
    wrap(PeftAdapterMixin, "load_adapter", _checking_adapter)
    wrap(PeftModel, "save_pretrained", _saving_base)
    wrap(PeftModel, "create_or_update_model_card", _carding)
    wrap(PreTrainedModel, "save_pretrained", _saving_native)


def fuse_lora(on: bool = True) -> None:
    """Let LoRA over quantized layers run as one autograd node, or turn that off again.

    It is on from the start, unless the environment says MODQ_FUSED_LORA=0. The adapters are the same.
    """
    wrap(lora.Linear, "forward", fused_forward)
    switch(on)


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


class _Original(NamedTuple):
    """What a layer held before the first of its adapters was merged."""

    qweight: QuantizedWeight
    bias: Tensor | None
    of_the_base: bool

    @classmethod
    def of(cls, base: QuantLinear) -> _Original:
        bias = None if base.bias is None else base.bias.detach().clone()
        return cls(base.quantized_weight, bias, is_original(base))

    def restore_bias(self, base: QuantLinear) -> None:
        if self.bias is not None:
            base.bias.data.copy_(self.bias)


def _remembering(merge: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        base = self.get_base_layer()
        if not isinstance(base, QuantLinear):
            return merge(self, *args, **kwargs)
        merged, before = list(self.merged_adapters), _Original.of(base)
        try:
            with base.writing_once():
                result = merge(self, *args, **kwargs)
        except BaseException:  # whatever it was, PEFT must not take for merged what was dropped
            self.merged_adapters[:] = merged
            before.restore_bias(base)
            raise
        if self.merged and not merged:
            self._modq_original = before
        return result

    return wrapped


def _restoring(unmerge: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        original: _Original | None = self.__dict__.get("_modq_original") if self.merged else None
        if original is None:
            return unmerge(self, *args, **kwargs)
        base = self.get_base_layer()
        with base.writing_once():
            result = unmerge(self, *args, **kwargs)
            if not self.merged:
                base.adopt(original.qweight.to(base.execution_device))
                original.restore_bias(base)
                if original.of_the_base:
                    base._modq_original_write = base.writes
                del self._modq_original
        return result

    return wrapped


def _checking_first(method: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(method)

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        if given.get("merge", True):
            _check_requantizable(self.model, given.get("adapter_names"))
        return method(self, *args, **kwargs)

    return wrapped


def _copying_dense(update: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        if any(quantized_layers(self.original_module)) and adapter_name not in self.modules_to_save:
            self.modules_to_save[adapter_name] = _dense_copy(self.original_module)
        return update(self, adapter_name, *args, **kwargs)

    return wrapped


def _dense_copy(module: nn.Module) -> nn.Module:
    if any(tensor.is_meta for _, layer in quantized_layers(module) for _, tensor in layer.named_packed()):
        raise CheckpointError(
            f"modules_to_save names a {type(module).__name__} that is offloaded, expected one in memory, "
            "where its copy can be trained; load the model with another device_map"
        )
    if isinstance(module, QuantLinear):
        return dense_layer(module, module.compute_dtype)
    copied = deepcopy(module)
    for name, layer in list(quantized_layers(copied)):
        copied.set_submodule(name, dense_layer(layer, layer.compute_dtype))
    return copied


def _checkpointing(prepare: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(prepare)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        model = prepare(*args, **kwargs)
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        if given.arguments["use_gradient_checkpointing"] and any(quantized_layers(model)):
            model.enable_input_require_grads()  # reentrant checkpointing needs an input with a gradient
            model.gradient_checkpointing_enable(given.arguments["gradient_checkpointing_kwargs"])
        return model

    return wrapped


_checking: ContextVar[bool] = ContextVar("modq_checking_adapter", default=False)
"""Whether a loading function that has checked is at work: it calls another one."""


def _checking_adapter(load: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(load)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        model, adapter = given.get("model", given.get("self")), _adapter(given)
        if adapter is None or _checking.get():
            return load(*args, **kwargs)
        check_adapter(model, adapter, {**given.get("kwargs", {}), **(given.get("adapter_kwargs") or {})})
        token = _checking.set(True)
        try:
            return load(*args, **kwargs)
        finally:
            _checking.reset(token)

    return wrapped


def _adapter(given: dict[str, Any]) -> Any:
    """The folder or name on the hub among a loading function's arguments; None if it gets tensors."""
    return given.get("model_id", given.get("peft_model_id"))


def _saving_base(save: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(save)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = save(*args, **kwargs)
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        model, folder = given.arguments["self"], given.arguments["save_directory"]
        if given.arguments["is_main_process"]:
            for name in given.arguments["selected_adapters"] or list(model.peft_config):
                save_base(model, folder if name == "default" else Path(folder, name))
        return result

    return wrapped


def _carding(update: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: Any, output_dir: str) -> Any:
        quantized = any(quantized_layers(self))
        if quantized:
            start_card(output_dir)
        result = update(self, output_dir)
        if quantized:
            write_adapter_card(output_dir, self)
        return result

    return wrapped


def _saving_native(save: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(save)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = save(*args, **kwargs)
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        model = given.arguments["self"]
        if getattr(model, "_hf_peft_config_loaded", False) and given.arguments["is_main_process"]:
            save_base(model, given.arguments["save_directory"])
        return result

    return wrapped


def _check_requantizable(model: nn.Module, adapter_names: Iterable[str] | None) -> None:
    """Raise a RequantizeError if a merge of these adapters, or the active ones, would write to a layer whose
    backend cannot make codes.
    """
    layers: Iterator[Any] = (layer for layer in model.modules() if isinstance(layer, BaseTunerLayer))
    for layer in layers:
        base = layer.get_base_layer()
        if isinstance(base, QuantLinear):
            wanted = set(layer.active_adapters if adapter_names is None else adapter_names)
            if wanted & layer._get_available_adapters() - set(layer.merged_adapters):
                base.check_requantizable()


wrap_peft()
fuse_lora(os.environ.get("MODQ_FUSED_LORA") != "0")

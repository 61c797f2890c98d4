"""What PEFT needs beside `QuantLinear.weight`: exact unmerges, and to know that the model is quantized.

PEFT merges by adding a delta to the weight, one for each adapter, and unmerges by subtracting it. On a
quantized weight each step rounds to the grid, so several adapters would round several times and subtracting
does not lead back. Here a merge writes to a dense draft that is quantized once at its end. The tensors from
before the merge are few and already there: each tuner layer over a QuantLinear keeps them while it is merged
and puts them back when it is not. They go when the tuner layer goes, as in `merge_and_unload`. And a merge
that one layer's backend would refuse is refused before any layer has changed.

`prepare_model_for_kbit_training` switches gradient checkpointing on for a list of quantization methods that
it knows. A script that relies on it would run out of memory on any other, so it does for modq's models too.

All this wraps functions of PEFT once, when `peft` has been imported; other models are untouched. The
alternatives looked worse: to tell an unmerge from its values is a guess, a class a tuner is what modq exists
to avoid, and to pass for another quantization method brings that method's special cases.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from typing import Any, NamedTuple

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from modq.linear import QuantLinear
from modq.model import quantized_layers
from modq.spec import QuantizedWeight

_MARK = "_modq_wrapped"


def wrap_peft() -> None:
    """Wrap the tuner classes that exist now; what is wrapped already stays as it is."""
    for cls in _subclasses(BaseTunerLayer):
        _wrap(cls, "merge", _remembering)
        _wrap(cls, "unmerge", _restoring)
    for method in ("merge_adapter", "_unload_and_optionally_merge"):
        _wrap(BaseTuner, method, _checking_first)
    for namespace in ("peft", "peft.utils", "peft.utils.other"):
        _wrap(sys.modules[namespace], "prepare_model_for_kbit_training", _checkpointing)


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def _wrap(owner: Any, name: str, wrapper: Callable[[Any], Callable[..., Any]]) -> None:
    method = vars(owner).get(name)
    if method is not None and not hasattr(method, _MARK):
        wrapped = wraps(method)(wrapper(method))
        setattr(wrapped, _MARK, True)
        setattr(owner, name, wrapped)


class _Original(NamedTuple):
    """What a layer held before the first of its adapters was merged."""

    qweight: QuantizedWeight
    bias: Tensor | None

    @classmethod
    def of(cls, base: QuantLinear) -> _Original:
        return cls(base.quantized_weight, None if base.bias is None else base.bias.detach().clone())

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

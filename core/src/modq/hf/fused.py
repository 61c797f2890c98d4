"""Which LoRA layers of PEFT run as one autograd node, and their forward: see `modq.lora` for the node.

It stands in the place of `peft.tuners.lora.Linear.forward`, and hands to PEFT's own all that the node does
not cover: other bases than a plain QuantLinear, variants (DoRA and the like), `lora_bias`, merged or disabled
adapters, `adapter_names` and other arguments, submodules that are hooked, patched or parametrized (offload,
ZeRO-3, FSDP around a single linear), tensors that are no plain ones (DTensor), adapters of several dtypes,
tracers and other modes that watch each operation, and torch.compile, which fuses in its own way. The modules
and what is saved of them stay PEFT's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook  # for such hooks, every module must be called

from modq.linear import QuantLinear
from modq.lora import Adapter, lora_linear

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_on = True


def switch(on: bool) -> None:
    """Let the layers run as one node where they can, or all as PEFT has them."""
    global _on
    _on = on


def fused_forward(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap `Linear.forward`."""

    def wrapped(self: Any, x: Any, *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling() or not _on or args or kwargs or not _is_plain_call(self, x):
            return forward(self, x, *args, **kwargs)
        base, names = self.base_layer, [name for name in self.active_adapters if name in self.lora_A]
        if not _covers(self, base, names, x):
            return forward(self, x)
        tensors = [tensor for _, tensor in base.named_packed()]
        return lora_linear(x, tensors, base.handle, base.bias, [_adapter(self, name) for name in names])

    return wrapped


def _is_plain_call(layer: Any, x: Any) -> bool:
    """Whether this is PEFT's own LoRA at work over a QuantLinear, where nothing traces or transforms."""
    return (
        type(layer) is Linear
        and type(layer.base_layer) is QuantLinear
        and not layer.disable_adapters
        and not layer.merged
        and getattr(layer, "cast_input_dtype_enabled", True)
        and _is_plain(x)
        and not x.is_meta
        and not _has_any_global_hook()  # type: ignore[no-untyped-call]  # torch's
        and not torch._C._is_tracing()
        and not torch._C._len_torch_dispatch_stack()  # selective checkpointing keeps what the node overwrites
    )


def _covers(layer: Any, base: QuantLinear, names: list[str], x: Tensor) -> bool:
    """Whether the node computes what these adapters do."""
    weights = [module.weight for name in names for module in (layer.lora_A[name], layer.lora_B[name])]
    dense = base.bias is None or (_is_plain(base.bias) and base.bias.device == x.device)
    return (
        bool(names)
        and dense
        and not any(name in layer.lora_variant for name in names)
        and all(isinstance(layer.scaling[name], int | float) for name in names)
        and all(_is_untouched(module) for module in _submodules(layer, base, names))
        and all(_is_plain(weight) and weight.device == x.device for weight in weights)
        and len({weight.dtype for weight in weights}) == 1
    )


def _submodules(layer: Any, base: QuantLinear, names: list[str]) -> Iterator[nn.Module]:
    yield base
    for name in names:
        yield layer.lora_A[name]
        yield layer.lora_B[name]
        yield layer.lora_dropout[name]


def _is_untouched(module: Any) -> bool:
    """Whether a call of the module is nothing but its class's forward, and that one is known."""
    known = type(module) in (QuantLinear, nn.Identity) or (
        module.bias is None if type(module) is nn.Linear else type(module) is nn.Dropout and module.p < 1
    )
    replaced = "forward" in vars(module) or module._compiled_call_impl is not None
    return known and not replaced and not any(vars(module)[hooks] for hooks in _HOOKS)


def _is_plain(tensor: Any) -> bool:
    return type(tensor) in (Tensor, nn.Parameter)


def _adapter(layer: Any, name: str) -> Adapter:
    dropout = layer.lora_dropout[name]
    p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    return Adapter(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name], p)

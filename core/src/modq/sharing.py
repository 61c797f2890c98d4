"""Packed tensors that several layers have in common: in memory once, stored once, shared again when loaded.

Where one matrix of a checkpoint stands for several linears, each of them needs all its codes. They hold the
very same Parameters: moves to another device keep those together, and they count once. transformers ties them
after loading, as it does embeddings and heads. A saved model has each tensor under its first name, and its
config records the other names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from modq.errors import CheckpointError
from modq.linear import QuantLinear


def find_shared(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Return {name: first name} of the tensors that came under another name before."""
    first: dict[Any, str] = {}
    names = [(name, first.setdefault(_identity(tensor), name)) for name, tensor in tensors]
    return {name: known for name, known in names if name != known}


def share(model: Any, shared: Mapping[str, str]) -> None:
    """Let layers of a transformers model hold tensors in common, now and after loading.

    Args:
        model: the model, whose layers hold slots of the right shapes.
        shared: {name: first name}, as `find_shared` gives it.
    """
    for name, source in shared.items():
        module, _, tensor = name.rpartition(".")
        try:
            setattr(model.get_submodule(module), tensor, model.get_parameter(source))
        except AttributeError:
            raise CheckpointError(
                f"quantization_config's record of shared tensors has {name} as {source}, and the model has "
                "no such tensor; is it edited by hand?"
            ) from None
        model.all_tied_weights_keys[name] = source


def named_packed(layers: Iterable[tuple[str, QuantLinear]]) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the packed tensors of layers by their full names."""
    return ((f"{name}.{key}", tensor) for name, layer in layers for key, tensor in layer.named_packed())


def packed_bytes(layers: Mapping[str, QuantLinear]) -> dict[str, float]:
    """Return the bytes of each layer's packed tensors, which may be sharded or offloaded.

    What layers share is divided among them by their numbers of weights: all layers together come to what is
    held.
    """
    holders: dict[Any, tuple[Tensor, list[str]]] = {}
    for name, layer in layers.items():
        for _, packed in layer.named_packed():
            holders.setdefault(_identity(packed), (packed, []))[1].append(name)
    weights = {name: layer.out_features * layer.in_features for name, layer in layers.items()}
    held = dict.fromkeys(layers, 0.0)
    for tensor, names in holders.values():
        nbytes, together = tensor.numel() * tensor.element_size(), sum(weights[name] for name in names)
        for name in names:
            held[name] += nbytes * weights[name] / together
    return held


def _identity(tensor: Tensor) -> Any:
    """What two tensors have in common if they are one: the memory, or the object where there is none here."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or not tensor.numel():
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape

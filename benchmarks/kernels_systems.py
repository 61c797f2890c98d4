"""What the suite `kernels` compares: how each system holds a weight, and what it calls to multiply by it.

Each library is imported in its own functions, because a cell runs in an environment that holds only the one
it measures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import ggml

GROUP = 128
"""Weights that share a scale in the peers, as in modq-affine-4."""

MODQ: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "modq-nf4": ("nf4", {"block_size": 64, "double_quant": True}),
    "modq-affine-4": ("optq", {"bits": 4, "group_size": 128, "symmetric": False}),
    "modq-affine-3": ("optq", {"bits": 3, "group_size": 128, "symmetric": False}),
    "modq-affine-2": ("optq", {"bits": 2, "group_size": 64, "symmetric": False}),
    "modq-affine-8": ("optq", {"bits": 8, "group_size": 128, "symmetric": False}),
    "modq-e8p": ("quipsharp", {"bits": 2}),
}

PACKAGES: Mapping[str, tuple[str, ...]] = {
    "modq": ("modq", "modq-nf4", "modq-optq", "modq-hqq", "modq-quipsharp"),
    "bitsandbytes": ("bitsandbytes",),
    "hqq": ("hqq",),
    "gptqmodel": ("gptqmodel",),
    "llama": ("llama-cpp-python",),
}
"""Whose versions the results state, by the first part of a system's name."""


class UnavailableError(Exception):
    """A system cannot run on this machine; the message says why."""


@dataclass(slots=True)
class Work:
    """A weight in copies, and the products with one of them.

    Attributes:
        weight: one copy, in the system's own form.
        nbytes: what it takes.
        forward: (copy, x) -> x @ W.T, differentiable in x.
        transposed: (copy, grad) -> grad @ W; None where the system has it only through autograd.
    """

    weight: Any
    nbytes: int
    forward: Callable[[Any, Tensor], Tensor]
    transposed: Callable[[Any, Tensor], Tensor] | None = None
    copies: list[Any] = field(default_factory=list)

    def copy(self, nbytes: int, most: int) -> None:
        """Make copies until they take `nbytes` together: at least two, at most so many."""
        count = min(max(2, -(-nbytes // self.nbytes)), most)
        self.copies = [self.weight, *(deepcopy(self.weight) for _ in range(count - 1))]


def _normal(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return (0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _read(shape: tuple[int, int], dtype: torch.dtype) -> Work:
    buffer = _normal(shape, torch.bfloat16).view(-1).view(torch.int64)
    return Work(buffer, _bytes(buffer), lambda copy, x: copy.sum())


def _dense(shape: tuple[int, int], dtype: torch.dtype) -> Work:
    weight = _normal(shape, dtype)
    return Work(weight, _bytes(weight), lambda w, x: functional.linear(x, w), lambda w, grad: grad @ w)


def _modq(backend: str, options: Mapping[str, Any], shape: tuple[int, int], dtype: torch.dtype) -> Work:
    from benchmarks.random_llama import quantized_sample, random_packed
    from modq.linear import QuantLinear
    from modq.op import multiply
    from modq.options import build_options

    sample = quantized_sample(backend, dict(options))
    dense = nn.Linear(shape[1], shape[0], bias=False, device="meta")
    layer = QuantLinear.like(dense, backend, build_options(backend, dict(options)))
    layer.allocate(sample.format_version, sample.meta)
    handle = layer.handle
    tensors = [tensor for _, tensor in random_packed(layer, sample, torch.Generator().manual_seed(0))]
    return Work(
        tensors,
        _bytes(*tensors),
        lambda packed, x: multiply(x, packed, handle),
        lambda packed, grad: multiply(grad, packed, handle, transpose=True),
    )


def _int4pack(shape: tuple[int, int], dtype: torch.dtype) -> Work:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(16, shape, dtype=torch.int32, generator=generator)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = 0.02 * torch.randn(shape[1] // GROUP, shape[0], 2, generator=generator).to(dtype)
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    return Work(
        (packed, scales), _bytes(packed, scales), lambda copy, x: multiply(x, copy[0], GROUP, copy[1])
    )


def _bitsandbytes_pair(weight: Tensor) -> tuple[Tensor, Any]:
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return packed, state


def _bitsandbytes_train(shape: tuple[int, int], dtype: torch.dtype) -> Work:
    from bitsandbytes import matmul_4bit

    packed, state = _bitsandbytes_pair(_normal(shape, dtype))
    nbytes = _bytes(packed, state.absmax, state.state2.absmax)
    return Work(
        (packed, state), nbytes, lambda copy, x: matmul_4bit(x, copy[0], quant_state=copy[1], bias=None)
    )


def _bitsandbytes_eval(shape: tuple[int, int], dtype: torch.dtype) -> Work:
    from bitsandbytes.functional import has_avx512bf16
    from bitsandbytes.nn import Linear4bit, Params4bit

    if not has_avx512bf16():
        raise UnavailableError("its packed kernel needs AVX512-BF16, which this CPU lacks")
    layer = Linear4bit(shape[1], shape[0], bias=False, compute_dtype=dtype, quant_type="nf4")
    layer.weight = Params4bit(_normal(shape, dtype), requires_grad=False, quant_type="nf4").to("cpu")
    layer.eval()
    with torch.no_grad():
        layer(torch.zeros(1, shape[1], dtype=dtype))  # packs the weight
    return Work(layer, layer.weight.nbytes, lambda copy, x: copy(x))


def _hqq_layer(weight: Tensor, group: int, dtype: torch.dtype, optimize: bool) -> Any:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    config = BaseQuantizeConfig(nbits=4, group_size=group)
    config["weight_quant_params"]["optimize"] = optimize
    return HQQLinear(linear, config, compute_dtype=dtype, device="cpu", del_orig=False)


def _hqq(shape: tuple[int, int], dtype: torch.dtype) -> Work:
    layer = _hqq_layer(_normal(shape, torch.float32), GROUP, dtype, optimize=False)
    layer.linear_layer = None  # the dense weight would be copied, too
    nbytes = _bytes(layer.W_q, layer.meta["scale"], layer.meta["zero"])
    return Work(layer, nbytes, lambda copy, x: copy(x))


def _gptqmodel(shape: tuple[int, int], dtype: torch.dtype) -> Work:
    """Make one layer that takes turns in holding the copies: a layer each would each be compiled anew."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    layer = TorchLinear(
        bits=4, group_size=GROUP, sym=False, desc_act=False, in_features=shape[1], out_features=shape[0]
    )
    generator = torch.Generator().manual_seed(0)
    for codes in (layer.qweight, layer.qzeros):
        codes.random_(-(2**31), 2**31 - 1, generator=generator)
    layer.scales = 0.01 * torch.rand(layer.scales.shape, generator=generator).to(dtype)
    layer.post_init()

    def forward(copy: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        layer.train(x.requires_grad)
        layer.qweight, layer.scales = copy
        product: Tensor = layer(x)
        return product

    nbytes = _bytes(layer.qweight, layer.scales, layer.qzeros)
    return Work((layer.qweight, layer.scales), nbytes, forward)


def _llama(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> Work:
    weight = ggml.matrix(shape, kind)
    for rows in (1, 4, 16):  # a graph is made once for each copy: not while it is timed
        weight.graph(rows)

    def forward(copy: Any, x: Tensor) -> Tensor:
        copy.run(len(x))
        return x

    return Work(weight, len(weight.data), forward)


MAKE: Mapping[str, Callable[[tuple[int, int], torch.dtype], Work]] = {
    "read": _read,
    "dense-bf16": _dense,
    "dense-fp32": _dense,
    **{name: partial(_modq, *backend_and_options) for name, backend_and_options in MODQ.items()},
    "int4pack": _int4pack,
    "bitsandbytes-train": _bitsandbytes_train,
    "bitsandbytes-eval": _bitsandbytes_eval,
    "hqq": _hqq,
    "gptqmodel": _gptqmodel,
    **{f"llama-{kind}": partial(_llama, kind) for kind in ggml.TYPES},
}
"""((out, in), dtype of x) -> the weight, as the system holds it."""


def _quantize_modq(backend: str, options: Mapping[str, Any], weight: Tensor) -> Any:
    import modq

    return modq.quantize(weight, backend, **options)


QUANTIZE: Mapping[str, Callable[[Tensor], Any]] = {
    "modq-nf4": partial(_quantize_modq, *MODQ["modq-nf4"]),
    "modq-hqq": partial(_quantize_modq, "hqq", {"bits": 4, "group_size": 64}),
    "modq-e8p": partial(_quantize_modq, *MODQ["modq-e8p"]),
    "bitsandbytes": _bitsandbytes_pair,
    "hqq": partial(_hqq_layer, group=64, dtype=torch.float16, optimize=True),
}
"""weight (out, in) float32 -> what the system makes of it."""

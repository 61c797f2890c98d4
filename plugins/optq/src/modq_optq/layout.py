"""What a weight of these options is made of: an affine layout, and the meta that says which."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from modq.layouts import Affine
from modq.layouts.affine import Zeros
from modq.spec import JSON, QuantizedWeight
from modq_optq.options import Options

FORMAT_VERSION = 1


def layout_of(shape: tuple[int, int], options: Options) -> Affine:
    """Return the layout of a weight of this shape."""
    return _layout(shape, **meta_of(options))


def layout_in(qweight: QuantizedWeight) -> Affine:
    """Return the layout of a quantized weight."""
    return layout_by_meta(qweight.shape, qweight.meta)


def layout_by_meta(shape: tuple[int, int], meta: Mapping[str, JSON]) -> Affine:
    """Return the layout of weights of this shape and meta."""
    return _layout(shape, **meta)


def meta_of(options: Options) -> dict[str, JSON]:
    """Return what decoding has to know, the same for layers of every shape."""
    zeros: Zeros = "symmetric" if options.symmetric else "integer" if options.zero_wrap else "float"
    return {
        "bits": options.bits,
        "group_size": options.group_size,
        "zeros": zeros,
        "scale_dtype": options.scale_dtype,
        "sorted": options.act_order == "full" and not options.static_groups,
    }


def transposed(matrix: Tensor) -> Tensor:
    """Return the transpose as a tensor of its own, row after row.

    `contiguous()` leaves a single column its strides, with which it cannot be viewed in another dtype.
    """
    return matrix.T.clone(memory_format=torch.contiguous_format)


@lru_cache(maxsize=256)
def _layout(
    shape: tuple[int, int], bits: int, group_size: int | None, zeros: Zeros, scale_dtype: str, sorted: bool
) -> Affine:
    size = min(group_size or shape[1], shape[1])
    permuted = sorted and size < shape[1]  # of a single group no column needs to know its place
    return Affine(shape, bits, size, zeros, getattr(torch, scale_dtype), permuted)

"""Products with a weight that is never built whole: it is dequantized block by block, each output written
once.

    forward    Y[:, r] = X · Ŵ[r, :]ᵀ     for blocks r of rows       [M, in] @ [in, |r|] -> [M, |r|]
    transpose  X[:, c] = Y · Ŵ[:, c]      for blocks c of columns    [M, out] @ [out, |c|] -> [M, |c|]

Each product walks the dimension that it does not sum over, so nothing is accumulated from block to block and
the error is that of the dense product. The alternative, row blocks in both directions, adds up dX in its own
dtype and has 2 to 6 times the dense error in bf16. Extra memory is one dense block, whatever the size of the
layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from typing import TypeAlias

import pluggy
import torch
from torch import Tensor

from modq.spec import Layout, QuantizedWeight, hookimpl

BLOCK_ELEMENTS = 1 << 19
"""Weights in a block. A block and what decoding it takes should stay in the cache: see docs/log.md."""

DequantizeBlock: TypeAlias = Callable[[slice, slice], Tensor]
"""(rows, columns) -> the dense Ŵ[rows, columns], in `gemm_dtype` of x or in the dtype of x."""


def blockwise_matmul(
    x: Tensor,
    dequantize_block: DequantizeBlock,
    shape: tuple[int, int],
    transpose: bool,
    block_elements: int = BLOCK_ELEMENTS,
) -> Tensor:
    """Multiply by a quantized matrix, dequantizing one block at a time.

    Args:
        x: (..., in), or (..., out) if `transpose`; any leading dimensions, none included.
        dequantize_block: gives a dense slice, best in `gemm_dtype(x)`.
        shape: (out, in) of the matrix.
        transpose: False for x @ Ŵ.T, True for x @ Ŵ.
        block_elements: how many weights to hold dense at once, at least one row or column.

    Returns:
        (..., out), or (..., in) if `transpose`, in the dtype of `x`.
    """
    width, depth = (shape[1], shape[0]) if transpose else shape
    y = x.new_empty((*x.shape[:-1], width))
    multiply_blocks(
        x.reshape(-1, depth), dequantize_block, shape, y.view(-1, width), transpose, block_elements
    )
    return y


def multiply_blocks(
    x: Tensor,
    dequantize_block: DequantizeBlock,
    shape: tuple[int, int],
    out: Tensor,
    transpose: bool,
    block_elements: int = BLOCK_ELEMENTS,
) -> None:
    """Write the product of x (m, depth) to `out` (m, width), of its dtype: see `blockwise_matmul`."""
    out_features, in_features = shape
    width, depth = (in_features, out_features) if transpose else (out_features, in_features)
    dtype = gemm_dtype(x)
    x = x.to(dtype)
    for block in blocks(width, depth, block_elements):
        if transpose:
            dense = dequantize_block(slice(0, out_features), block).to(dtype)
        else:
            dense = dequantize_block(block, slice(0, in_features)).to(dtype).T
        if dtype == out.dtype:
            torch.mm(x, dense, out=out[:, block])
        else:
            out[:, block] = torch.mm(x, dense)
        del dense  # before the next block is made


def gemm_dtype(x: Tensor) -> torch.dtype:
    """Return in which dtype torch multiplies matrices of the dtype of `x` fast on its device.

    A CPU without instructions for half precision falls back to loops that take hundreds of times as long as
    float32 does.
    """
    if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) and not _fast(x.dtype):
        return torch.float32
    return x.dtype


@cache
def _fast(dtype: torch.dtype) -> bool:
    """Tell whether oneDNN has a GEMM of this half precision on this CPU."""
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    supported: bool = getattr(torch.ops.mkldnn, name)()
    return supported


def blocks(width: int, depth: int, block_elements: int) -> Iterator[slice]:
    """Cut `width` into near-equal slices of at most `block_elements` weights, but at least one line."""
    count = -(-width // max(1, block_elements // depth))
    edges = [width * i // count for i in range(count + 1)]
    return (slice(start, stop) for start, stop in pairwise(edges))


class Fallback:
    """The core's answers for hooks that a plugin lacks or declines; it is called last."""

    def __init__(self, hooks: pluggy.HookRelay) -> None:
        self._hooks = hooks

    @hookimpl(trylast=True)
    def matmul(self, x: Tensor, qweight: QuantizedWeight, transpose: bool) -> Tensor:
        """Multiply by the plugin's layout; without one, dequantize by blocks."""
        layout: Layout | None = self._hooks.layout(shape=qweight.shape, meta=qweight.meta)
        if layout is not None:
            return layout.matmul(x, qweight.tensors, transpose)
        dtype = gemm_dtype(x)

        def dequantize_block(rows: slice, columns: slice) -> Tensor:
            dense: Tensor = self._hooks.dequantize(qweight=qweight, dtype=dtype, rows=rows, columns=columns)
            return dense

        return blockwise_matmul(x, dequantize_block, qweight.shape, transpose)

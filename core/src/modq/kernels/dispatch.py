"""The one place that decides how a product with a layout is computed.

    few rows of x     a kernel's fused product: codes are decoded in registers, or in tiles
    many rows         blocks of the weight, decoded by the kernel, times x by torch's GEMM
    no kernel         the same with the layout's own decoding in plain torch: the reference

A layout names its kernels in `kernels`: for each device type import paths, the first that covers a weight is
taken. It is data, so that declaring one imports nothing. Where few rows become many is measured, see
`modq.kernels.crossing`. MODQ_KERNELS=reference turns all kernels off.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache, partial
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from modq.kernels.crossing import SURELY_FUSED, fused_rows, timed, without_measuring
from modq.materialize import BLOCK_ELEMENTS, gemm_dtype, multiply_blocks
from modq.spec import FewRows

SWITCH = "MODQ_KERNELS"

DECODED_ELEMENTS = 1 << 21
"""Weights that a kernel decodes for one GEMM. It takes no memory beside them: they may be more than in plain
torch; the GEMM then gains more than the cache loses: see docs/log.md."""


class Kernel(Protocol):
    """What computes with one layout on one kind of device."""

    @property
    def provider(self) -> str:
        """The name of what computes: with the same one, results are equal bit for bit."""

    def why_missing(self) -> str | None:
        """Say why it cannot run here, or return None."""

    def covers(self, layout: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> bool:
        """Tell whether it can read these tensors and compute in this dtype."""

    def product(
        self, layout: Any, x: Tensor, tensors: Mapping[str, Tensor], out: Tensor, transpose: bool
    ) -> None:
        """Write the product of x (m, depth) to `out` (m, width), of its dtype; both with contiguous rows.

        Best for few rows.
        """

    def dequantize(
        self, layout: Any, tensors: Mapping[str, Tensor], out: Tensor, rows: slice, columns: slice
    ) -> None:
        """Write the dense slice to `out`, whose rows are contiguous and whose dtype is covered."""


@runtime_checkable
class Binder(Protocol):
    """A kernel whose product of few rows can be looked up in advance."""

    def bind(self, layout: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> FewRows:
        """Return `product`, not transposed, for contiguous x and out of this dtype."""


@runtime_checkable
class Encoder(Protocol):
    """A kernel that finds codes too."""

    def encode(self, layout: Any, run: Tensor) -> tuple[Tensor, Tensor] | None:
        """Encode a flat run, or decline with None: see `encoded`."""


class Decodable(Protocol):
    """What a layout must be to be dispatched."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    @property
    def kernels(self) -> Mapping[str, tuple[str, ...]]:
        """Import paths "module:name" of its kernels, best first, by device type."""

    @property
    def kind(self) -> str:
        """What decides the speed of decoding, such as "affine 4 bits"; crossings are measured for it."""

    def decode(
        self, tensors: Mapping[str, Tensor], dtype: torch.dtype, rows: slice, columns: slice
    ) -> Tensor:
        """Return the dense slice in float32 or float64, in plain torch: the reference."""


def kernel_for(layout: Decodable, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Kernel | None:
    """Return the kernel that computes with this weight in this dtype; None for the reference."""
    if os.environ.get(SWITCH) == "reference":
        return None
    candidates = named_kernels(layout, next(iter(tensors.values())).device.type)
    return next((kernel for kernel in candidates if kernel.covers(layout, tensors, dtype)), None)


def multiply(layout: Decodable, x: Tensor, tensors: Mapping[str, Tensor], transpose: bool) -> Tensor:
    """Multiply: x @ Ŵ.T, or x @ Ŵ if `transpose`; any leading dimensions, the dtype of x."""
    out_features, in_features = layout.shape
    width, depth = (in_features, out_features) if transpose else (out_features, in_features)
    rows = x.reshape(-1, depth)
    y = x.new_empty((*x.shape[:-1], width))
    out, count = y.view(-1, width), rows.shape[0]
    kernel = kernel_for(layout, tensors, x.dtype)
    if kernel is not None and 0 < count <= _fused_rows(layout, kernel, rows, tensors, transpose):
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        kernel.product(layout, rows, tensors, out, transpose)
    else:
        multiply_by_blocks(layout, kernel, rows, tensors, out, transpose)
    return y


def _fused_rows(
    layout: Decodable, kernel: Kernel, x: Tensor, tensors: Mapping[str, Tensor], transpose: bool
) -> int:
    """Return up to how many rows the kernel's own product is used."""
    rows = x.shape[0]
    sure = without_measuring(rows)
    if sure is not None:
        return sure

    def seconds(rows: int, fused: bool) -> float:
        tried = x[:1].expand(rows, -1).contiguous()
        out = x.new_empty((rows, layout.shape[1] if transpose else layout.shape[0]))
        way = kernel.product if fused else partial(multiply_by_blocks, kernel=kernel)
        return timed(lambda: way(layout=layout, x=tried, tensors=tensors, out=out, transpose=transpose))

    direction = "transpose" if transpose else "forward"
    dtype = str(x.dtype).removeprefix("torch.")
    return fused_rows(f"{kernel.provider} {layout.kind} {dtype} {direction}", seconds)


def few_rows(layout: Decodable, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> FewRows | None:
    """Return what `multiply` would do with a few contiguous rows of this dtype, or None."""
    kernel = kernel_for(layout, tensors, dtype)
    if not isinstance(kernel, Binder) or (without_measuring(SURELY_FUSED) or 0) < SURELY_FUSED:
        return None
    return kernel.bind(layout, tensors, dtype)


def multiply_by_blocks(
    layout: Decodable,
    kernel: Kernel | None,
    x: Tensor,
    tensors: Mapping[str, Tensor],
    out: Tensor,
    transpose: bool,
) -> None:
    """Write the product of x (m, depth) to `out` (m, width), by torch's GEMM with a block at a time."""
    dtype = gemm_dtype(x)
    # One buffer for all blocks: fresh memory would be mapped page by page, which takes as long as decoding.
    elements = BLOCK_ELEMENTS if kernel is None else DECODED_ELEMENTS
    largest = min(max(elements, x.shape[1]), layout.shape[0] * layout.shape[1])
    buffer = x.new_empty(0 if kernel is None else largest, dtype=dtype)

    def dequantize_block(rows: slice, columns: slice) -> Tensor:
        if kernel is None:
            compute = torch.float64 if dtype == torch.float64 else torch.float32
            return layout.decode(tensors, compute, rows, columns).to(dtype)
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        block = buffer[: shape[0] * shape[1]].view(shape)
        kernel.dequantize(layout, tensors, block, rows, columns)
        return block

    multiply_blocks(x, dequantize_block, layout.shape, out, transpose, block_elements=elements)


def dequantized(
    layout: Decodable, tensors: Mapping[str, Tensor], dtype: torch.dtype, rows: slice, columns: slice
) -> Tensor | None:
    """Return the dense slice as a kernel decodes it, or None where there is none for it."""
    kernel = kernel_for(layout, tensors, dtype)
    if kernel is None:
        return None
    device = next(iter(tensors.values())).device
    out = torch.empty((rows.stop - rows.start, columns.stop - columns.start), dtype=dtype, device=device)
    if out.numel():
        kernel.dequantize(layout, tensors, out, rows, columns)
    return out


def encoded(layout: Any, run: Tensor) -> tuple[Tensor, Tensor] | None:
    """Encode a flat run of float32 by a kernel of a layout that has a table, or None where there is none.

    Returns:
        codes (n,) uint8 and absmax scales (blocks,) float32; see `Codebook.encode`.
    """
    if os.environ.get(SWITCH) == "reference":
        return None
    candidates = named_kernels(layout, run.device.type)
    found = (kernel.encode(layout, run) for kernel in candidates if isinstance(kernel, Encoder))
    return next((pair for pair in found if pair is not None), None)


def named_kernels(layout: Any, device: str) -> list[Kernel]:
    """Return the kernels that a layout names for a kind of device, best first."""
    return [_kernel(path) for path in layout.kernels.get(device, ())]


@cache
def _kernel(path: str) -> Kernel:
    module, name = path.split(":")
    kernel: Kernel = getattr(import_module(module), name)
    return kernel

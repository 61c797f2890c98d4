"""The layouts on a CPU: what `csrc` does, called by ctypes.

Each kernel passes a layout's numbers and the addresses of its tensors; nothing is copied and nothing is kept.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Mapping
from ctypes import Structure, byref, c_int32, c_int64, c_void_p
from functools import cache, lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from modq.kernels.library import isa, library, why_missing
from modq.layouts.affine import Affine
from modq.layouts.codebook import Codebook
from modq.layouts.vector import VectorCodebook
from modq.spec import FewRows

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The dtypes of activations and scales that kernels take, by their numbers in tensors.h."""


class Strided(Structure):
    """A matrix with contiguous rows, as in tensors.h."""

    _fields_: ClassVar = [("data", c_void_p), ("stride", c_int64), ("dtype", c_int32)]

    @classmethod
    def of(cls, matrix: Tensor) -> Strided:
        """Describe a matrix whose rows are contiguous."""
        return cls(matrix.data_ptr(), matrix.stride(0), DTYPES[matrix.dtype])


class LibraryKernel(ABC):
    """A layout's functions in a library, `<name>_product` and `<name>_dequantize`: a `dispatch.Kernel`.

    A subclass says how its tensors cross, in `describe`.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def library(self) -> ctypes.CDLL | None:
        """Return the library that holds the functions."""
        return library()

    def why_missing(self) -> str | None:
        """Say why there is none, or return None."""
        return why_missing()

    @property
    def provider(self) -> str:
        """The name of what computes: with the same one, results are equal bit for bit."""
        opened = self.library()
        return "none" if opened is None else f"cpu-{isa(opened)}"

    @abstractmethod
    def describe(self, layout: Any, tensors: Mapping[str, Tensor]) -> Structure:
        """Return what the functions take for a weight."""

    def covers(self, layout: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> bool:
        """Tell whether it can read these tensors and compute in this dtype."""
        return dtype in DTYPES and self.library() is not None and all(map(_plain, tensors.values()))

    def product(
        self, layout: Any, x: Tensor, tensors: Mapping[str, Tensor], out: Tensor, transpose: bool
    ) -> None:
        """Write the product of x (m, depth) to `out` (m, width), both with contiguous rows."""
        weight = self.describe(layout, tensors)
        call = _function(self, "product")
        _check(call(byref(weight), byref(Strided.of(x)), x.shape[0], byref(Strided.of(out)), transpose))

    def bind(self, layout: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> FewRows:
        """Return `product`, not transposed, for contiguous x and out of this dtype."""
        (width, depth), number = layout.shape, DTYPES[dtype]
        weight, call = byref(self.describe(layout, tensors)), _function(self, "product")

        def product(x: int, out: int, rows: int) -> None:
            given, got = Strided(x, depth, number), Strided(out, width, number)
            _check(call(weight, byref(given), rows, byref(got), False))

        return product

    def dequantize(
        self, layout: Any, tensors: Mapping[str, Tensor], out: Tensor, rows: slice, columns: slice
    ) -> None:
        """Write the dense slice to `out`, whose rows are contiguous."""
        weight = self.describe(layout, tensors)
        call = _function(self, "dequantize")
        _check(
            call(byref(weight), rows.start, rows.stop, columns.start, columns.stop, byref(Strided.of(out)))
        )


class _AffineWeight(Structure):
    _fields_: ClassVar = [
        ("rows", c_int64),
        ("columns", c_int64),
        ("bits", c_int64),
        ("group_size", c_int64),
        ("codes", c_void_p),
        ("codes_stride", c_int64),
        ("scales", c_void_p),
        ("zeros", c_void_p),
        ("zeros_stride", c_int64),
        ("scale_dtype", c_int32),
    ]


class _AffineKernel(LibraryKernel):
    def covers(self, layout: Affine, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> bool:
        return layout.scale_dtype in DTYPES and super().covers(layout, tensors, dtype)

    def describe(self, layout: Affine, tensors: Mapping[str, Tensor]) -> Structure:
        codes, zeros = tensors["codes"], tensors.get("zeros")
        return _AffineWeight(
            *layout.shape,
            layout.bits,
            layout.group_size,
            codes.data_ptr(),
            codes.stride(0),
            tensors["scales"].data_ptr(),
            None if zeros is None else zeros.data_ptr(),
            zeros.stride(0) if zeros is not None and layout.zeros == "integer" else 0,
            DTYPES[layout.scale_dtype],
        )


class _CodebookWeight(Structure):
    _fields_: ClassVar = [
        ("rows", c_int64),
        ("columns", c_int64),
        ("bits", c_int64),
        ("block_size", c_int64),
        ("codes", c_void_p),
        ("codes_stride", c_int64),
        ("table", c_void_p),
        ("scales", c_void_p),
        ("scale_codes", c_void_p),
        ("scale_table", c_void_p),
        ("scale_offset", c_void_p),
        ("nested_block_size", c_int64),
    ]
    tables: tuple[Tensor, ...]  # what it has addresses of that is in no tensor of the weight


class _Search(Structure):
    _fields_: ClassVar = [
        ("block_size", c_int64),
        ("entries", c_int64),
        ("borders", c_void_p),
        ("code_of", c_void_p),
    ]


class _CodebookKernel(LibraryKernel):
    def describe(self, layout: Codebook, tensors: Mapping[str, Tensor]) -> Structure:
        codes, nested = tensors["codes"], layout.nested
        common = (*layout.shape, layout.bits, layout.block_size, codes.data_ptr(), codes.stride(0))
        table = _numbers(layout.table)
        if nested is None:
            weight = _CodebookWeight(
                *common, table.data_ptr(), tensors["scales"].data_ptr(), None, None, None, 1
            )
            weight.tables = (table,)
            return weight
        of_scales = _numbers(nested.table)
        weight = _CodebookWeight(
            *common,
            table.data_ptr(),
            tensors["scale_scales"].data_ptr(),
            tensors["scale_codes"].data_ptr(),
            of_scales.data_ptr(),
            tensors["scale_offset"].data_ptr(),
            nested.block_size,
        )
        weight.tables = (table, of_scales)
        return weight

    def encode(self, layout: Codebook, run: Tensor) -> tuple[Tensor, Tensor] | None:
        """Encode a flat run of float32 that starts with a block, or decline with None.

        Returns:
            A code for each number, uint8, the lesser of two where it is halfway; and absmax scales, float32,
            one for each block.
        """
        opened = self.library()
        if opened is None or not _plain(run):
            return None
        borders, code_of = _borders(layout.table)
        codes = torch.empty(len(run), dtype=torch.uint8)
        scales = torch.empty(-(-len(run) // layout.block_size), dtype=torch.float32)
        search = _Search(layout.block_size, len(layout.table), borders.data_ptr(), code_of.data_ptr())
        call = _function(self, "encode")
        _check(call(byref(search), run.data_ptr(), len(run), codes.data_ptr(), scales.data_ptr()))
        return codes, scales


class _VectorWeight(Structure):
    _fields_: ClassVar = [
        ("rows", c_int64),
        ("columns", c_int64),
        ("bits", c_int64),
        ("codebooks", c_int64),
        ("vector_size", c_int64),
        ("codes", c_void_p),
        ("tables", c_void_p),
        ("scales", c_void_p),
        ("dtype", c_int32),
    ]


class _VectorKernel(LibraryKernel):
    def covers(self, layout: VectorCodebook, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> bool:
        readable = layout.dtype in DTYPES and layout.vector_size % 8 == 0
        return readable and super().covers(layout, tensors, dtype)

    def describe(self, layout: VectorCodebook, tensors: Mapping[str, Tensor]) -> Structure:
        return _VectorWeight(
            *layout.shape,
            layout.bits,
            layout.codebooks,
            layout.vector_size,
            tensors["codes"].data_ptr(),
            tensors["codebooks"].data_ptr(),
            tensors["scales"].data_ptr(),
            DTYPES[layout.dtype],
        )


AFFINE = _AffineKernel("modq_affine")
CODEBOOK = _CodebookKernel("modq_codebook")
VECTOR = _VectorKernel("modq_vector")


def _plain(tensor: Tensor) -> bool:
    """Tell whether a tensor has memory here that can be read as it lies, and is no tracer's stand-in."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu" and tensor.is_contiguous()


def _check(status: int) -> None:
    if status == 1:
        raise MemoryError("a compiled kernel could not get memory for the rows of x; use fewer rows at once")
    if status:
        raise RuntimeError(f"a compiled kernel returned status {status}: it does not cover this weight")


@cache
def _function(kernel: LibraryKernel, what: str) -> Any:
    """Return a function of a kernel with its arguments declared: ctypes would pass int as 32 bits."""
    weight, strided = c_void_p, c_void_p
    arguments = {
        "product": (weight, strided, c_int64, strided, c_int32),
        "dequantize": (weight, c_int64, c_int64, c_int64, c_int64, strided),
        "encode": (c_void_p, c_void_p, c_int64, c_void_p, c_void_p),
    }[what]
    function = getattr(kernel.library(), f"{kernel.name}_{what}")
    function.argtypes, function.restype = arguments, c_int32
    return function


@lru_cache(maxsize=64)
def _numbers(table: tuple[float, ...]) -> Tensor:
    return torch.tensor(table, dtype=torch.float32)


@lru_cache(maxsize=64)
def _borders(table: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Return the midpoints between the sorted entries, one more to round the count, and the code of each."""
    numbers, order = _numbers(table).sort(stable=True)
    return torch.cat([(numbers[1:] + numbers[:-1]) / 2, numbers[-1:]]), order.to(torch.uint8)

"""E8P codes on a CPU: what `csrc` does, called by ctypes. Without the library, all is plain torch.

The point of a code c, times four, is `rows[c >> 8] ^ signs[c & 255]`. For the entries of A, times four, are
2, 6 or 10; held with +1 their two lowest bits are ones, and to negate one or to move it by −2 flips the
same bits in all of them. So two tables of 4 KiB stand for one of a MiB. They hold 16 bits for each number,
as instructions multiply them: to widen 8 bits takes longer than to read twice as much.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping
from ctypes import Structure, byref, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from modq.kernels.cpu import DTYPES, LibraryKernel, Strided
from modq.kernels.dispatch import SWITCH
from modq.kernels.library import SUFFIX, load_library, why_missing
from modq.spec import FewRows
from modq_quipsharp.constants import constant
from modq_quipsharp.e8 import absolute_rows, e8p_points, e81b_points
from modq_quipsharp.nearest import row_of_key

if TYPE_CHECKING:
    from modq_quipsharp.codebooks import E8P, Coded
    from modq_quipsharp.turn import Turn

LIBRARY = Path(__file__).with_name(f"libmodq_quipsharp_cpu{SUFFIX}")

_CPU = torch.device("cpu")


@cache
def library() -> ctypes.CDLL | None:
    """Return this package's library, or None where there is none."""
    return None if why_missing(LIBRARY) else load_library(LIBRARY)


class _E8PWeight(Structure):
    """`modq_e8p` of e8p.h."""

    _fields_: ClassVar = [
        ("rows", c_int64),
        ("columns", c_int64),
        ("bits", c_int64),
        ("codes", c_void_p),
        ("codes_stride", c_int64),
        ("residual", c_void_p),
        ("residual_stride", c_int64),
        ("row_table", c_void_p),
        ("sign_table", c_void_p),
        ("fine_table", c_void_p),
        ("finer", c_float),
        ("half", c_int32),
    ]


class _E8PKernel(LibraryKernel):
    def library(self) -> ctypes.CDLL | None:
        return library()

    def why_missing(self) -> str | None:
        return why_missing(LIBRARY)

    def describe(self, layout: Coded, tensors: Mapping[str, Tensor]) -> Structure:
        points: Any = layout.points
        codes, residual = tensors["codes"], tensors.get("residual")
        rows, signs, fine = tables()
        return _E8PWeight(
            *layout.shape,
            points.bits,
            codes.data_ptr(),
            codes.stride(0) * codes.element_size(),
            None if residual is None else residual.data_ptr(),
            0 if residual is None else residual.stride(0) * residual.element_size(),
            rows.data_ptr(),
            signs.data_ptr(),
            fine.data_ptr(),
            1 / points.residual_scale,
            layout.half,
        )


E8P_KERNEL = _E8PKernel("modq_e8p")


def tables() -> tuple[Tensor, Tensor, Tensor]:
    """Return what a code's upper and lower byte stand for, and the points of E81B: (256, 8) int16 each."""
    return (
        constant("e8p rows", lambda: e8p_points()[::256].short(), _CPU),
        constant("e8p signs", lambda: (e8p_points()[:256] ^ e8p_points()[0]).short(), _CPU),
        constant("e81b rows", lambda: e81b_points().short(), _CPU),
    )


class _Turn(Structure):
    """`modq_turn` of e8p.h."""

    _fields_: ClassVar = [
        ("size", c_int64),
        ("k", c_int64),
        ("offset", c_int64),
        ("count", c_int64),
        ("first", c_void_p),
        ("scales", c_void_p),
        ("factor", c_void_p),
        ("unit", c_float),
    ]
    matrix: Tensor  # what `first` is the address of


def turn(side: Turn, x: Tensor, dtype: torch.dtype, transpose: bool) -> Tensor | None:
    """Do what `Turn.apply` does, or decline with None."""
    call = _turning(side) if _is_covered(x) and dtype in DTYPES else None
    if call is None:
        return None
    x = x if x.stride(1) == 1 else x.contiguous()
    y = x.new_empty((len(x), side.rotation.size if transpose else len(side.scales)), dtype=dtype)
    call(Strided.of(x), len(x), Strided.of(y), transpose)
    return y


def bind_turn(side: Turn, given: torch.dtype, got: torch.dtype, *, transpose: bool) -> FewRows | None:
    """Return what does so from contiguous rows of one dtype to those of another, or None."""
    call = _turning(side) if given in DTYPES and got in DTYPES else None
    if call is None:
        return None
    widths = side.rotation.size, len(side.scales)
    to, of = widths if transpose else widths[::-1]

    def apply(x: int, out: int, rows: int) -> None:
        call(Strided(x, of, DTYPES[given]), rows, Strided(out, to, DTYPES[got]), transpose)

    return apply


def _turning(side: Turn) -> Callable[[Strided, int, Strided, bool], None] | None:
    """Return the library's function for this side, or None where there is none or it is not to be used."""
    opened, first = library(), side.rotation.first(torch.float32, side.scales.device)
    reference = os.environ.get(SWITCH) == "reference"
    if opened is None or first is None or reference or not _is_covered(side.scales):
        return None
    its = _Turn(
        side.rotation.size,
        len(first),
        side.own.start,
        len(side.scales),
        first.data_ptr(),
        side.scales.data_ptr(),
        None if side.factor is None else side.factor.data_ptr(),
        side.unit,
    )
    its.matrix = first
    described, call = byref(its), _function(opened, "modq_turn_apply", c_int32)

    def turn_rows(x: Strided, rows: int, y: Strided, transpose: bool) -> None:
        status = call(described, byref(x), rows, byref(y), transpose)
        if status:
            raise MemoryError(f"modq_turn_apply returned status {status}: there is no memory for a row")

    return turn_rows


def _is_covered(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu"
    return plain and tensor.dtype in DTYPES


class _Search(Structure):
    """`modq_e8p_search` of e8p.h."""

    _fields_: ClassVar = [
        ("bits", c_int64),
        ("row_of_key", c_void_p),
        ("halves", c_void_p),
        ("fine_points", c_void_p),
        ("fine_norms", c_void_p),
        ("scale", c_float),
    ]


def nearest(codebook: E8P, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Round (n, 8) float32 as `E8P.nearest` does, or decline with None."""
    opened = library()
    plain = type(x) is Tensor and x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous()
    if opened is None or not plain or os.environ.get(SWITCH) == "reference":
        return None
    points, codes = torch.empty_like(x), torch.empty((len(x), codebook.stages), dtype=torch.int32)
    fine = constant("e81b points", lambda: e81b_points() / 4, _CPU, torch.float32)
    search = _Search(
        codebook.bits,
        constant("e8p keys", lambda: row_of_key().to(torch.uint8), _CPU).data_ptr(),
        constant("e8p halves", _halves, _CPU).data_ptr(),
        fine.data_ptr(),
        constant("e81b norms", lambda: fine.square().sum(1), _CPU).data_ptr(),
        codebook.residual_scale,
    )
    call = _function(opened, "modq_e8p_nearest", c_void_p)
    status = call(byref(search), x.data_ptr(), len(x), points.data_ptr(), codes.data_ptr())
    if status:
        raise RuntimeError(f"modq_e8p_nearest returned status {status}, expected 0")
    return points, codes


@cache
def _function(opened: ctypes.CDLL, name: str, last: Any) -> Any:
    """Return a function with its arguments declared: ctypes would pass int as 32 bits."""
    function = getattr(opened, name)
    function.argtypes, function.restype = (c_void_p, c_void_p, c_int64, c_void_p, last), c_int32
    return function


def _halves() -> Tensor:
    """Return where the three ½ of the rows of norm² 12 stand, a bit for each element: (29,) uint8."""
    halves = torch.tensor(absolute_rows()[227:]) == 1
    return (halves * 2 ** torch.arange(8)).sum(1).to(torch.uint8)

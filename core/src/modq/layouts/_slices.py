"""What the layouts share: checks of what they are given, and numbers that hold for a group of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from modq.errors import DtypeError, ShapeError
from modq.kernels import dispatch
from modq.materialize import BLOCK_ELEMENTS, blocks
from modq.spec import TensorSpec


def dequantize(
    layout: dispatch.Decodable,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    rows: slice,
    columns: slice,
    decode: Callable[[Mapping[str, Tensor], torch.dtype, slice, slice], Tensor] | None = None,
) -> Tensor:
    """Return a dense slice: by `decode` if given, else by a kernel, or without one by `layout.decode`."""
    compute = compute_dtype(dtype)
    rows = bounded(rows, layout.shape[0], "rows")
    columns = bounded(columns, layout.shape[1], "columns")
    dense = None if decode else dispatch.dequantized(layout, tensors, dtype, rows, columns)
    if dense is not None:
        return dense
    decode = decode or layout.decode

    def decode_rows(part: slice) -> Tensor:
        return decode(tensors, compute, part, columns)

    return dequantize_by_rows(decode_rows, rows, columns, dtype, tensors["codes"].device)


def dequantize_by_rows(
    decode: Callable[[slice], Tensor], rows: slice, columns: slice, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Fill a dense slice from `decode(rows)`, a few rows at a time, so that decoding stays in the cache."""
    height, width = rows.stop - rows.start, columns.stop - columns.start
    dense = torch.empty((height, width), dtype=dtype, device=device)
    for part in blocks(height, width, BLOCK_ELEMENTS) if height * width else ():
        dense[part] = decode(slice(rows.start + part.start, rows.start + part.stop))
    return dense


def by_group(
    values: Tensor, per_group: Tensor, group_size: int, offset: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pair views of `values` with the numbers of their groups, such that they broadcast.

    Args:
        values: (rows, n), neighbours along a row.
        per_group: (rows, groups), one number for each group that the n columns touch.
        group_size: columns in a group.
        offset: place of the first column in its group.

    Yields:
        The end of a group that began before, all whole groups, and the start of one that is cut short; those
        of the three that there are.
    """
    rows, n = values.shape
    head = min(-offset % group_size, n)
    whole = (n - head) // group_size
    tail = head + whole * group_size
    first = 1 if head else 0
    if head:
        yield values[:, :head], per_group[:, :1]
    if whole:
        yield values[:, head:tail].view(rows, whole, group_size), per_group[:, first : first + whole, None]
    if tail < n:
        yield values[:, tail:], per_group[:, -1:]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what to compute in for a result of `dtype`."""
    if not dtype.is_floating_point:
        raise DtypeError(f"dtype={dtype}, expected a floating point dtype such as torch.bfloat16")
    return torch.float64 if dtype == torch.float64 else torch.float32


def bounded(part: slice, length: int, name: str) -> slice:
    """Return a slice with its start and stop filled in, or raise a ShapeError if it leaves the matrix."""
    start, stop, step = part.indices(length)
    given = (part.start if part.start is not None else 0, part.stop if part.stop is not None else length)
    if given != (start, stop) or start > stop or step != 1:
        raise ShapeError(f"{name}={part!r}, expected 0 <= start <= stop <= {length} and step 1")
    return slice(start, stop)


def check_shape(shape: tuple[int, int]) -> None:
    """Raise a ShapeError unless this is the (out, in) of a matrix that has weights."""
    if len(shape) != 2 or min(shape) < 1:
        raise ShapeError(f"shape={shape!r}, expected (out_features, in_features), both at least 1")


def check_tensors(tensors: Mapping[str, Tensor], specs: Mapping[str, TensorSpec]) -> None:
    """Raise unless the tensors are those that the layout describes, in name, dtype and shape."""
    for name, spec in specs.items():
        if name not in tensors:
            given = ", ".join(map(repr, tensors)) or "nothing"
            raise ShapeError(f"no tensor {name!r}, given {given}; expected {', '.join(map(repr, specs))}")
        check_tensor(name, tensors[name], spec)


def check_tensor(name: str, tensor: Tensor, spec: TensorSpec) -> None:
    """Raise unless a tensor has the dtype and shape of its spec."""
    if tensor.dtype != spec.dtype:
        raise DtypeError(f"{name!r} is {tensor.dtype}, expected {spec.dtype}; convert it")
    if tensor.shape != spec.shape:
        raise ShapeError(f"{name!r} has shape {tuple(tensor.shape)}, expected {spec.shape}; reshape it")


def check_input(x: Tensor, shape: tuple[int, int], transpose: bool) -> None:
    """Raise unless x can be multiplied by a matrix of `shape` in this direction."""
    compute_dtype(x.dtype)
    depth, name = (shape[0], "out_features") if transpose else (shape[1], "in_features")
    if x.ndim < 1 or x.shape[-1] != depth:
        raise ShapeError(f"x has shape {tuple(x.shape)}, expected (..., {depth}), the {name} of {shape}")

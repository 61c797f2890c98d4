"""Codes of 1, 2, 3, 4 or 8 bits as a stream of bits along each row, and back, directly into numbers.

A row of n codes is one little-endian stream: code k holds the stream's bits [bits·k, bits·k + bits), and
bit j of the stream is bit j % 8 of byte j // 8. The row is padded with zeros to a whole byte, so rows slice
freely. Codes of 3 bits cross byte borders and meet one every three bytes (GPTQ's 3-bit layout is the same
stream); the other widths divide a byte.

Decoding is a lookup. An *index* is a run of bits that holds several codes (a byte; for 3 bits half of three
bytes, that is 12 bits), and a table gives the numbers that all of its codes stand for at once: at 4 bits one
gather of 8 bytes yields two float32. Shifting and masking out each code, then looking each up, costs several
times as much in plain torch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from modq.errors import DtypeError, OptionError, ShapeError
from modq.layouts._slices import bounded
from modq.materialize import BLOCK_ELEMENTS, blocks

WIDTHS = (1, 2, 3, 4, 8)

_TABLES: dict[tuple[tuple[float, ...], int, torch.dtype, torch.device], Tensor] = {}


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (rows, n) uint8 into (rows, ceil(n·bits/8)) uint8."""
    check_width(bits)
    _check_bytes("codes", codes)
    if codes.numel() and bits < 8 and int(codes.max()) >> bits:
        raise OptionError(f"a code is {int(codes.max())}, expected 0 to {2**bits - 1} for {bits} bits")
    rows, n = codes.shape
    packed = codes.new_empty((rows, packed_bytes(n, bits)))
    for part in blocks(rows, n, BLOCK_ELEMENTS) if packed.numel() else ():
        packed[part] = _pack_block(codes[part], bits)
    return packed


def unpack_bits(packed: Tensor, bits: int, columns: slice) -> Tensor:
    """Unpack the codes of a slice of columns, reading only the bytes that they touch: (rows, len) uint8."""
    check_width(bits)
    _check_bytes("packed codes", packed)
    columns = bounded(columns, packed.shape[1] * 8 // bits, "columns")
    return decode_bits(packed, bits, columns, tuple(range(2**bits)), torch.uint8).contiguous()


def decode_bits(
    packed: Tensor, bits: int, columns: slice, table: tuple[float, ...], dtype: torch.dtype
) -> Tensor:
    """Decode a slice of columns through a table of 2^bits numbers: (rows, len) in `dtype`, a fresh tensor.

    The result is contiguous unless the slice starts or ends inside an index. `columns` has start and stop.
    """
    run_bytes, run_codes = _run(bits)
    first, last = columns.start // run_codes, -(-columns.stop // run_codes)
    raw = packed[:, first * run_bytes : last * run_bytes]
    values = _gather(_indices(raw, bits), _index_table(table, bits, dtype, packed.device))
    skip = columns.start - first * run_codes
    return values[:, skip : skip + columns.stop - columns.start]


def unpack_bits_at(packed: Tensor, bits: int, places: Tensor) -> Tensor:
    """Unpack the codes that stand at `places` (n,) int32 in each row, in that order: (rows, n) uint8."""
    byte, shift = places * bits // 8, places * bits % 8
    low = packed.index_select(1, byte).int()
    high = packed.index_select(1, (byte + 1).clamp(max=packed.shape[1] - 1)).int()  # only 3 bits ever need it
    codes: Tensor = (low | high << 8) >> shift & (2**bits - 1)
    return codes.to(torch.uint8)


def packed_bytes(n: int, bits: int) -> int:
    """Return how many bytes a row of `n` codes takes."""
    return -(-n * bits // 8)


def check_width(bits: int) -> None:
    """Raise an OptionError unless codes can have this width."""
    if bits not in WIDTHS:
        raise OptionError(f"bits={bits!r}, expected one of {', '.join(map(str, WIDTHS))}")


def _check_bytes(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.uint8:
        raise DtypeError(f"{name} are {tensor.dtype}, expected torch.uint8; convert them")
    if tensor.ndim != 2:
        raise ShapeError(f"{name} have shape {tuple(tensor.shape)}, expected two dimensions; reshape them")


def _run(bits: int) -> tuple[int, int]:
    """(bytes, codes) of the shortest run that starts and ends on byte borders."""
    return (3, 8) if bits == 3 else (1, 8 // bits)


def _index_bits(bits: int) -> int:
    return 12 if bits == 3 else 8


def _pack_block(codes: Tensor, bits: int) -> Tensor:
    run_bytes, run_codes = _run(bits)
    rows, n = codes.shape
    runs = F.pad(codes, (0, -n % run_codes)).int().reshape(rows, -(-n // run_codes), run_codes)
    words = (runs << torch.arange(0, bits * run_codes, bits, device=codes.device)).sum(-1, keepdim=True)
    packed: Tensor = words >> torch.arange(0, 8 * run_bytes, 8, device=codes.device) & 255
    return packed.flatten(1)[:, : packed_bytes(n, bits)].to(torch.uint8)


def _indices(raw: Tensor, bits: int) -> Tensor:
    """Read bytes (rows, bytes) as int32 indices (rows, n)."""
    if bits != 3:
        return raw.int()
    rows, n = raw.shape
    triples = F.pad(raw, (0, -n % 3)).int().reshape(rows, -(-n // 3), 3)
    low, middle, high = triples.unbind(-1)
    return torch.stack((low | (middle & 15) << 8, middle >> 4 | high << 4), dim=-1).flatten(1)


def _gather(indices: Tensor, table: Tensor) -> Tensor:
    """Replace each index by its row of the table: (rows, n), (2^index_bits, k) -> (rows, n·k)."""
    rows, n = indices.shape
    width = table.shape[1]
    # Entries that fill an integer are gathered as one: twice as fast on a CPU as copying a short row.
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(width * table.element_size())
    entries = table if whole is None else table.view(whole).flatten()
    return entries.index_select(0, indices.flatten()).view(table.dtype).view(rows, n * width)


def _index_table(table: tuple[float, ...], bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the numbers of all codes of each index, (2^index_bits, codes in an index).

    Kept for each device, since copying a table to an accelerator waits for it. Entries are float32 numbers,
    whatever the dtype, so that float64 refines the arithmetic and not the table.
    """
    key = (table, bits, dtype, device)
    if key in _TABLES:
        return _TABLES[key]
    with torch.inference_mode(False):  # a kept inference tensor would be unusable outside
        index = torch.arange(2 ** _index_bits(bits), device=device)[:, None]
        codes = index >> torch.arange(0, _index_bits(bits), bits, device=device) & (2**bits - 1)
        numbers = torch.tensor(table, dtype=torch.float32, device=device).to(dtype)[codes]
    if type(numbers) is Tensor:  # not one of a tracer's stand-ins
        _TABLES[key] = numbers
    return numbers

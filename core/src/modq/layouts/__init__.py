"""Layouts: how codes and scales lie in tensors, and what matrix they stand for. Plugins compose them.

A layout is a small frozen value that knows a shape and how to read tensors of that shape; it holds none:

    specs()                                     the tensors of a matrix, known before any weight is read
    pack(codes, ...) / unpack(tensors)          to and from one uint8 a weight
    dequantize(tensors, dtype, rows, columns)   a dense slice, decoding only that slice
    matmul(x, tensors, transpose)               x @ Ŵ.T or x @ Ŵ, one block of Ŵ at a time

This is plain torch, and the oracle that faster kernels are tested against. It computes in float32 (in
float64 if that is the dtype asked for) and rounds once, to the dtype asked for. Decoding never waits for the
device.
"""

from modq.layouts.affine import Affine
from modq.layouts.bitpack import decode_bits, pack_bits, packed_bytes, unpack_bits
from modq.layouts.codebook import Codebook, NestedScales
from modq.layouts.rotations import hadamard_factors, hadamard_transform, kronecker
from modq.layouts.vector import VectorCodebook

__all__ = [
    "Affine",
    "Codebook",
    "NestedScales",
    "VectorCodebook",
    "decode_bits",
    "hadamard_factors",
    "hadamard_transform",
    "kronecker",
    "pack_bits",
    "packed_bytes",
    "unpack_bits",
]

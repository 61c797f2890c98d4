"""Rotations: the published Hadamard matrices, orthogonal for every size, and each transposed."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from torch import Tensor

from modq.errors import ShapeError
from modq_quipsharp.hadamard import SIZES, hadamard_matrix
from modq_quipsharp.rotation import Rotation

HASHES = {
    12: "67507aecbe2abee5",
    20: "f54960fecf1ccf70",
    28: "a6cb994c78f9acd4",
    36: "d674d8240e6b622b",
    52: "9ee082772819b105",
    60: "091e76fba0aef583",
    108: "690a34c6c9ed2f0e",
    116: "e35aecfbc1d95799",
    124: "9b41cf5242a1dd12",
    140: "b9ff01506ffe4db5",
    156: "99a1b852ce559ffd",
    172: "378ef12c7cc31f3e",
}


def matrix(rotation: Rotation) -> Tensor:
    """Return U, by applying it to the unit vectors: its columns."""
    return rotation.apply(torch.eye(rotation.size, dtype=torch.float64)).T


def sylvester(size: int) -> Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < size:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h


@pytest.mark.parametrize(("size", "expected"), HASHES.items())
def test_hadamard_matrices_are_the_published_ones(size: int, expected: str) -> None:
    found = hadamard_matrix(size)
    assert hashlib.sha256(found.numpy().tobytes()).hexdigest()[:16] == expected
    assert torch.equal(found.int() @ found.T.int(), size * torch.eye(size, dtype=torch.int32))


def test_no_size_of_the_list_is_left_out() -> None:
    assert (1, *HASHES) == SIZES


@pytest.mark.parametrize(("size", "first"), [(64, 1), (96, 12), (192, 12), (576, 36), (160, 20), (172, 172)])
def test_a_size_of_the_list_has_the_published_matrix(size: int, first: int) -> None:
    expected = torch.kron(hadamard_matrix(first).double(), sylvester(size // first)) / math.sqrt(size)
    torch.testing.assert_close(matrix(Rotation(size, "hadamard")), expected)


@pytest.mark.parametrize("kind", ["hadamard", "kronecker"])
@pytest.mark.parametrize("size", [1, 2, 3, 6, 7, 24, 64, 96, 172, 250, 296, 304, 576, 719])
def test_every_size_has_an_orthogonal_matrix_and_its_transpose(size: int, kind: str) -> None:
    rotation = Rotation(size, kind)
    u = matrix(rotation)
    unit = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(u.T @ u, unit)
    torch.testing.assert_close(rotation.apply(unit, transpose=True).T, u.T)


@pytest.mark.parametrize("size", [250, 296, 719, 4864 // 16])
def test_the_fallback_spreads_a_vector_as_far_as_sqrt_2_allows(size: int) -> None:
    assert matrix(Rotation(size, "hadamard")).abs().max() <= math.sqrt(2 / size) + 1e-12


def test_random_matrices_differ_by_seed_and_are_what_they_were() -> None:
    one, other = (matrix(Rotation(24, "kronecker", seed)) for seed in (0, 1))
    assert (one - other).abs().max() > 0.1
    # computed without torch's generator, so that a file means the same with any version
    torch.testing.assert_close(one[0, 0].item(), 0.14634871116451595, rtol=0, atol=1e-9)


def test_a_random_matrix_as_large_as_a_layer_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"size 8198 .* 4099, at most 4096; use rotation 'hadamard'"):
        Rotation(2 * 4099, "kronecker")


@pytest.mark.parametrize("kind", ["hadamard", "kronecker"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_leading_dimensions_and_dtypes_are_kept(kind: str, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 304, dtype=dtype, generator=torch.Generator().manual_seed(0))
    y = Rotation(304, kind).apply(x)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    torch.testing.assert_close(y[1, 2], matrix(Rotation(304, kind)).to(dtype) @ x[1, 2])

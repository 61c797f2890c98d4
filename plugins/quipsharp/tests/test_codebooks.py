"""The codebooks: bit-equal to the published ones, rounded to exactly, stored without loss."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor

from modq.spec import TensorSpec
from modq_quipsharp.codebooks import E8P, Codebook, Grid
from modq_quipsharp.e8 import absolute_rows, e8p_points, e81b_points
from modq_quipsharp.nearest import nearest_e8p

ALL = slice(0, None)
CODEBOOKS = [E8P(2, 1.0), E8P(3, 2.04), E8P(4, 3.45), Grid(2), Grid(3), Grid(4)]
every_codebook = pytest.mark.parametrize("codebook", CODEBOOKS, ids=str)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.to(torch.int8).contiguous().numpy().tobytes()).hexdigest()[:16]


def test_the_tables_are_the_published_ones() -> None:
    assert digest(torch.tensor(absolute_rows())) == "4310f9ed6450a9f8"
    assert digest(e8p_points()) == "ea3883a85a627590"
    assert digest(e81b_points() // 2) == "37ce1a66345c1bbc"


def test_the_table_has_its_norms_and_its_spread() -> None:
    rows = torch.tensor(absolute_rows())
    norms, counts = (rows.square().sum(1) // 4).unique(return_counts=True)
    assert dict(zip(norms.tolist(), counts.tolist(), strict=True)) == {
        2: 1,
        4: 8,
        6: 28,
        8: 64,
        10: 126,
        12: 29,
    }
    points = e8p_points()
    assert (points % 2 == 1).all()
    assert points.abs().max() == 11
    assert float((points / 4).square().mean()) == pytest.approx(1.1963, abs=1e-4)


@pytest.mark.parametrize(
    ("code", "fourfold"),
    [
        (0x0000, [3] * 8),
        (0x0001, [1] * 8),
        (0x0002, [-3, 1, -3, 1, 1, 1, 1, 1]),
        (0x0080, [-3, 1, 1, 1, 1, 1, 1, -3]),
        (0x0100, [3, 3, 3, 3, 3, 3, 3, -5]),
        (0x1234, [-3, -3, 1, -3, -7, 1, 1, 5]),
        (0xE3A5, [-5, 3, 3, -1, -5, 7, 7, 7]),
        (0xFFFF, [-5, -5, -1, -1, -5, -5, -5, 3]),
    ],
)
def test_codes_stand_for_the_published_points(code: int, fourfold: list[int]) -> None:
    assert e8p_points()[code].tolist() == fourfold
    stored = {"codes": torch.tensor([[code]]).to(torch.int16)}
    assert E8P(2, 1.0).decode(stored, torch.float32, ALL, slice(0, 8)).tolist() == [fourfold]


@pytest.mark.parametrize("spread", [0.3, 0.9, 1.03, 1.6, 3.0])
def test_the_nearest_point_is_as_near_as_the_best_of_all(spread: float) -> None:
    points = e8p_points().double() / 4
    x = (spread * gaussian(400, 8)).double()
    best = torch.cat([torch.cdist(part, points).amin(1) for part in x.split(50)])
    found = (points[nearest_e8p(x.float()).long()] - x).norm(dim=1)
    assert (found - best).max() < 1e-6  # what rounding to float32 may cost


def test_ties_and_points_themselves_are_rounded_to_nearest_points() -> None:
    points = e8p_points() / 4
    assert torch.equal(nearest_e8p(points), torch.arange(65536, dtype=torch.int32))
    for x in (torch.zeros(1, 8), torch.ones(1, 8), torch.full((1, 8), -0.75), 0.5 * torch.eye(8)):
        found = (points[nearest_e8p(x).long()] - x).norm(dim=1)
        assert torch.allclose(found, torch.cdist(x, points).amin(1), atol=1e-6)


def test_points_of_e81b_are_rounded_to_the_nearest() -> None:
    x = gaussian(500, 8)
    codebook = E8P(3, 2.04)
    points, codes = codebook.nearest(x)
    first = e8p_points()[codes[:, 0].long()] / 4
    finer = e81b_points() / 4
    left = (x - first) * 2.04
    assert torch.equal(torch.cdist(left, finer).argmin(1).int(), codes[:, 1])
    torch.testing.assert_close(points, first + finer[codes[:, 1].long()] / 2.04)


@pytest.mark.parametrize(
    ("codebook", "scale", "error"),
    [
        (E8P(2, 1.0), 1.03, 0.0912),
        (E8P(2, 1.0), 0.9, 0.0989),
        (E8P(3, 2.04), 0.98, 0.0294),
        (E8P(4, 3.45), 1.03, 0.0096),
        (E8P(4, 3.45), 0.9, 0.0087),
        (Grid(2), 1.0043, 0.1188),  # Max 1960, table II: the best even quantizers of a Gaussian
        (Grid(3), 1.7065, 0.03744),
        (Grid(4), 2.9833, 0.01154),
    ],
    ids=str,
)
def test_a_gaussian_loses_what_was_published(codebook: Codebook, scale: float, error: float) -> None:
    x = gaussian(60_000, 8).view(-1, codebook.block) * scale
    found = float((codebook.nearest(x)[0] - x).square().mean() / scale**2)
    assert found == pytest.approx(error, rel=0.012, abs=5e-5)  # published to two or three digits


@every_codebook
def test_codes_come_back_from_the_tensors_and_in_slices(codebook: Codebook) -> None:
    x = gaussian(5, 48)
    points, codes = codebook.nearest(x.view(-1, codebook.block))
    tensors = codebook.pack(codes.view(5, 48 // codebook.block, -1))
    assert {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()} == codebook.specs(
        (5, 48)
    )
    whole = codebook.decode(tensors, torch.float32, ALL, slice(0, 48))
    torch.testing.assert_close(whole * codebook.unit, points.view(5, 48))
    part = codebook.decode(tensors, torch.float64, slice(1, 4), slice(11, 45))
    torch.testing.assert_close(part, whole[1:4, 11:45].double(), rtol=1e-6, atol=1e-6)


def test_a_weight_takes_its_bits() -> None:
    for codebook in CODEBOOKS:
        specs = codebook.specs((16, 64)).values()
        assert (
            sum(8 * spec.dtype.itemsize * spec.shape[0] * spec.shape[1] for spec in specs)
            == 1024 * codebook.bits
        )

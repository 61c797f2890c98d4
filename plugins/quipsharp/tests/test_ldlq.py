"""Rounding with feedback: the published recurrences, what they gain, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modq.errors import WeightError
from modq_quipsharp.codebooks import E8P, Codebook, Grid
from modq_quipsharp.ldlq import block_lower, round_plainly, round_with_feedback

CODEBOOKS = pytest.mark.parametrize(
    "codebook", [E8P(2, 1.0), E8P(3, 2.04), E8P(4, 3.45), Grid(2), Grid(4)], ids=str
)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(n: int) -> Tensor:
    """Return the second moments of inputs of which a quarter of the directions are strong, damped."""
    x = gaussian(4 * n, n // 4, seed=1) @ gaussian(n // 4, n, seed=2) + gaussian(4 * n, n, seed=3)
    hessian = x.T @ x
    hessian /= hessian.diagonal().mean()
    return hessian + 0.01 * torch.eye(n)


def loss(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    error = (weight - rounded).double()
    return float(((error @ hessian.double()) * error).sum())


@pytest.mark.parametrize("block", [1, 8])
def test_the_factor_is_unit_block_lower_and_gives_back_the_hessian(block: int) -> None:
    hessian = correlated(48)
    lower = block_lower(hessian, block)
    tiles = lower.view(48 // block, block, 48 // block, block).transpose(1, 2)
    for i in range(len(tiles)):
        torch.testing.assert_close(tiles[i, i], torch.eye(block), atol=1e-5, rtol=0)
        assert not tiles[i, i + 1 :].any()
    inverse = torch.linalg.inv(lower.double())
    middle = (
        (inverse @ hessian.double() @ inverse.T).view(48 // block, block, 48 // block, block).transpose(1, 2)
    )
    off = [middle[i, j].abs().max() for i in range(len(middle)) for j in range(len(middle)) if i != j]
    assert max(off) < 1e-5 * float(hessian.abs().max())


@CODEBOOKS
def test_feedback_is_the_recurrence_of_the_paper(codebook: Codebook) -> None:
    """Written out a block at a time, without groups, in float64."""
    n, block = 272, codebook.block  # two whole groups of 128 and a part of one
    weight, hessian = gaussian(6, n), correlated(n)
    lower, error = block_lower(hessian, block).double(), torch.zeros(6, n, dtype=torch.float64)
    for start in reversed(range(0, n, block)):
        part = slice(start, start + block)
        goal = weight[:, part].double() + error[:, part.stop :] @ lower[part.stop :, part]
        error[:, part] = weight[:, part].double() - codebook.nearest(goal.float())[0].double()
    rounded, _ = round_with_feedback(weight, hessian, codebook, passes=0)
    # float32 sums may tip a weight over to another point; the recurrence then goes another way in that row
    same = (rounded - (weight - error)).abs().amax(1) < 1e-4
    assert same.sum() >= 4
    assert loss(weight, rounded, hessian) == pytest.approx(loss(weight, weight - error, hessian), rel=0.05)


@CODEBOOKS
def test_feedback_and_then_each_pass_lower_the_loss(codebook: Codebook) -> None:
    weight, hessian = gaussian(40, 144), correlated(144)
    losses = [loss(weight, round_plainly(weight, codebook)[0], hessian)]
    for passes in (0, 1, 2, 5):
        rounded, codes = round_with_feedback(weight, hessian, codebook, passes)
        losses.append(loss(weight, rounded, hessian))
        tensors = codebook.pack(codes)
        decoded = codebook.decode(tensors, torch.float32, slice(0, 40), slice(0, 144)) * codebook.unit
        torch.testing.assert_close(decoded, rounded)
    assert losses[1] < 0.5 * losses[0]
    assert losses == sorted(losses, reverse=True)
    assert losses[3] < losses[1]


def test_the_identity_needs_no_feedback() -> None:
    weight = gaussian(10, 64)
    rounded, codes = round_with_feedback(weight, torch.eye(64), E8P(2, 1.0), passes=3)
    plain, plain_codes = round_plainly(weight, E8P(2, 1.0))
    assert torch.equal(rounded, plain)
    assert torch.equal(codes, plain_codes)


def test_a_hessian_that_is_not_positive_definite_is_refused() -> None:
    hessian = torch.eye(16)
    hessian[3, 3] = -1
    with pytest.raises(WeightError, match="not positive definite, even damped"):
        round_with_feedback(gaussian(4, 16), hessian, Grid(2), 0)

"""Rotations by small factors: the matrices that they stand for, and their errors."""

import pytest
import torch

from modq.errors import ShapeError
from modq.layouts.rotations import hadamard_factors, hadamard_transform, kronecker


def sylvester(size):
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < size:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h / size**0.5


@pytest.mark.parametrize("size", [1, 2, 64, 128, 2048])
def test_the_transform_is_sylvesters_matrix_and_its_own_inverse(size):
    unit = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(hadamard_transform(unit), sylvester(size))
    torch.testing.assert_close(hadamard_transform(hadamard_transform(unit)), unit)


def test_the_transform_is_as_close_as_the_dense_product(generator):
    x = torch.randn(2, 16, 4096, generator=generator)
    exact = x.double() @ sylvester(4096)
    dense = (x @ sylvester(4096).float()).double()
    assert (hadamard_transform(x) - exact).norm() <= 2 * (dense - exact).norm()


def test_a_product_of_factors_is_their_kronecker_product(generator):
    factors = [torch.randn(k, k, generator=generator, dtype=torch.float64) for k in (3, 2, 5)]
    whole = torch.kron(torch.kron(factors[0], factors[1]), factors[2])
    x = torch.randn(4, 7, 30, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(kronecker(x, factors), x @ whole.T)
    transposed = [factor.T for factor in factors]
    torch.testing.assert_close(kronecker(x[0, 0], transposed), whole.T @ x[0, 0])
    torch.testing.assert_close(
        kronecker(x.transpose(0, 1)[..., :6], factors[:2]),
        x.transpose(0, 1)[..., :6] @ torch.kron(*factors[:2]).T,
    )


def test_factors_are_small_and_shared():
    factors = hadamard_factors(1 << 14, torch.float32, torch.device("cpu"))
    assert max(len(factor) for factor in factors) <= 64
    assert hadamard_factors(1 << 14, torch.float32, torch.device("cpu"))[0] is factors[0]


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError, match="size=12, expected a power of two"):
        hadamard_transform(torch.ones(3, 12))
    with pytest.raises(ShapeError, match=r"\(3, 12\), expected \(..., 6\)"):
        kronecker(torch.ones(3, 12), [torch.eye(2), torch.eye(3)])

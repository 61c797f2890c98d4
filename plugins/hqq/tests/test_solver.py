"""The solver against the published formulas in float64, and against plain rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modq_hqq.options import Options
from modq_hqq.solver import CHUNK_ELEMENTS, quantize_groups

BITS = (8, 4, 3, 2, 1)


def heavy_tailed(groups: int, size: int, scale: float = 0.02, seed: int = 0) -> Tensor:
    """Student's t with 4 degrees of freedom, and a spread of its own for each group, as real weights have."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    spread = torch.exp(0.3 * normal(groups, 1)) * scale
    return spread * normal(groups, size) / normal(4, groups, size).square().mean(0).sqrt()


def solve(weight: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    scales, zeros = quantize_groups([weight], [codes], options)
    return codes, scales, zeros


def formulas(weight: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor, list[float]]:
    """HQQ as its authors write it, in float64; also the error before each step."""
    weight, top = weight.double(), 2**options.bits - 1
    low, high = weight.min(1, keepdim=True).values, weight.max(1, keepdim=True).values
    inverse = torch.where(high - low <= 1e-4, 1.0, top / (high - low)).clamp(max=2e4)
    zero = -low * inverse
    zero = zero.round() if options.rounds_zero else zero
    p, beta, errors = options.lp_norm, options.beta, [float("inf")]
    for _ in range(options.iters if options.optimize else 0):
        quantized = ((weight * inverse + zero).round()).clamp(0, top)
        error = weight - (quantized - zero) / inverse
        size = error.abs()
        shrunk = error.sign() * torch.relu(size - (size.pow(p - 1) / beta).nan_to_num(posinf=1e300))
        zero = (quantized - (weight - shrunk) * inverse).mean(1, keepdim=True)
        errors.append(float(size.mean()))
        if not errors[-1] < errors[-2]:
            break
        beta *= options.kappa
    codes = (weight * inverse + zero).round().clamp(0, top)
    return codes, 1 / inverse.flatten(), zero.flatten(), errors[1:]


def decoded(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    return (codes.double() - zeros.double()[:, None]) * scales.double()[:, None]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale", [0.02, 1.0])  # errors under the threshold of the shrinking, and above it
@pytest.mark.parametrize(
    "given",
    [{}, {"kappa": 1.05, "lp_norm": 0.5}, {"lp_norm": 1.0, "beta": 2.0}, {"round_zero": True}, {"iters": 3}],
    ids=str,
)
def test_the_solver_is_the_published_one(bits: int, scale: float, given: dict) -> None:
    weight = heavy_tailed(96, 64, scale)
    options = Options(bits, scale_dtype="float32", **given)
    codes, scales, zeros = solve(weight, options)
    expected_codes, expected_scales, expected_zeros, errors = formulas(weight, options)
    assert len(errors) >= 2
    torch.testing.assert_close(scales.double(), expected_scales, rtol=1e-6, atol=0)
    # A weight halfway between two codes may go either way in float32 and in float64, and shifts its group.
    assert (codes != expected_codes).double().mean() < 1e-3
    shifts = (zeros.double() - expected_zeros).abs()
    assert shifts.median() < 1e-5
    assert (shifts > 1e-3).double().mean() < 0.05


def test_the_scales_of_float16_keep_the_bounds_of_the_package() -> None:
    weight = heavy_tailed(8, 64)
    widths = weight.amax(1) - weight.amin(1)
    weight[0] *= 9e-5 / widths[0]  # taken for a constant
    weight[1] *= 5e-4 / widths[1]  # s = 15/5e-4 is bounded
    _, scales, _ = solve(weight, Options())
    assert scales[0] == 1
    assert scales[1] == torch.tensor(5e-5, dtype=torch.float16)
    _, wide, _ = solve(weight, Options(scale_dtype="float32"))
    assert (wide[:2] < 5e-5).all()


def rise(errors: list[float]) -> float:
    """By how much the error rises at the second step, if it does then."""
    return errors[1] - errors[0] if len(errors) == 2 else 0.0


def test_chunks_are_one_matrix_to_the_early_stop() -> None:
    """A chunk whose error soon rises stops the others, though theirs would fall on."""
    options = Options(2, scale_dtype="float32")
    calm = heavy_tailed(CHUNK_ELEMENTS // 64, 64)
    brief = max(calm[:, None], key=lambda group: rise(formulas(group, options)[3])).clone()
    calm *= 0.05
    weight = torch.cat((calm, brief.expand(CHUNK_ELEMENTS // 64, -1)))
    codes, _, zeros = solve(weight, options)
    expected_codes, _, expected_zeros, errors = formulas(weight, options)
    assert len(errors) <= 3 < len(formulas(calm, options)[3])
    assert (codes != expected_codes).double().mean() < 1e-4
    assert (zeros.double() - expected_zeros).abs().max() < 1e-3


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
def test_fitting_the_zeros_beats_rounding_to_the_nearest(bits: int, scale_dtype: str) -> None:
    weight = heavy_tailed(1024, 64)

    def losses(optimize: bool) -> tuple[float, float]:
        options = Options(bits, scale_dtype=scale_dtype, optimize=optimize, round_zero=False)
        error = (decoded(*solve(weight, options)) - weight).abs()
        return float(error.mean()), float(error.square().mean())

    for fitted, rounded in zip(losses(True), losses(False), strict=True):
        assert fitted < 0.99 * rounded


@pytest.mark.parametrize("bits", BITS)
def test_codes_chosen_for_the_stored_numbers_lose_less_than_codes_chosen_before(bits: int) -> None:
    """The package rounds scales and zeros to 16 bits last: at 8 bits a zero may move by half a step."""
    weight = heavy_tailed(1024, 64)
    exact, _, _ = solve(weight, Options(bits, scale_dtype="float32"))
    for scale_dtype in ("float16", "bfloat16"):
        codes, scales, zeros = solve(weight, Options(bits, scale_dtype=scale_dtype))
        ours = (decoded(codes, scales, zeros) - weight).norm()
        theirs = (decoded(exact, scales, zeros) - weight).norm()
        assert ours <= theirs
        if bits == 8 and scale_dtype == "bfloat16":
            assert ours < 0.9 * theirs


def test_zeros_are_no_integers_even_where_they_start_so() -> None:
    _, _, zeros = solve(heavy_tailed(64, 64), Options(4, scale_dtype="float32"))
    assert (zeros != zeros.round()).double().mean() > 0.9
    _, _, plain = solve(heavy_tailed(64, 64), Options(4, scale_dtype="float32", optimize=False))
    assert torch.equal(plain, plain.round())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_dtype_of_the_weight_does_not_matter(dtype: torch.dtype) -> None:
    weight = heavy_tailed(64, 64).to(dtype)
    for one, other in zip(solve(weight, Options(3)), solve(weight.float(), Options(3)), strict=True):
        assert torch.equal(one, other)

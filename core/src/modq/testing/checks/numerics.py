"""What the hooks compute, against float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from modq.api import dequantize_slice, matmul
from modq.errors import ModqError
from modq.materialize import blockwise_matmul
from modq.spec import QuantizedWeight
from modq.testing.check import Breach, NotApplicable, check
from modq.testing.checks.contract import relative_error, without_data
from modq.testing.compare import as_close, same_bits, same_weight
from modq.testing.subject import Subject, Variant, gaussian

BOTH_WAYS = (False, True)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = 37
"""Of x, where their number is not what is checked: enough that one rounding more or less does not count."""

LEADING = ((), (1,), (2, 3), (3,), (16,), (300,), (2, 1, 5))
"""Leading shapes of x, of one row and of many: kernels differ."""

BESIDE = 16
"""Roundings beside those of a sum, of scales and rotations."""

LONG, SHORT = 2048, 32
"""The sides of a weight over which sums are long, in either direction."""

NEAR = 1.5
"""How much larger the relative error may be where nothing but the scale of a weight differs."""

LINE, ENOUGH = 2, 32
"""How many times the declared error a single row or column may have, if it has as many numbers."""

USUAL_SCALES = (1e-2, 1e2)
EXTREME_SCALES = (1e-30, 1e-6, 1e4, 1e30)


# The dense weight


@check()
def dequantize_gives_the_dtype_asked_for(subject: Subject) -> None:
    """Ŵ comes in exactly the dtype asked for, contiguous, in memory of its own, within two roundings."""
    for variant, shape in subject.cases():
        qweight = subject.quantized(variant, shape)
        exact = subject.dense(qweight, torch.float64)
        for dtype in (torch.float64, *DTYPES):
            dense = subject.dense(qweight, dtype)
            _check_own(dense, shape, dtype, qweight, f"{variant}, {shape}")
            _check_rounding("Ŵ", dense, exact, f"{variant}, {shape}")


@check()
def slices_equal_the_whole(subject: Subject) -> None:
    """Ŵ[rows, columns] is the whole Ŵ there, ragged slices, single rows and single columns included."""
    for variant in subject.variants:
        for shape in subject.shapes:
            for dtype in (torch.float64, torch.float32, torch.bfloat16):
                _check_slices(subject, subject.quantized(variant, shape), dtype, f"{variant}, {shape}")


# Products


@check()
def the_product_is_as_close_as_the_dense_one(subject: Subject) -> None:
    """x @ Ŵ.T has at most twice the dense product's error, in each dtype, for ragged shapes too."""
    _check_products(subject, transpose=False)


@check()
def the_transposed_product_is_as_close_as_the_dense_one(subject: Subject) -> None:
    """x @ Ŵ has at most twice the dense product's error, in each dtype, for ragged shapes too."""
    _check_products(subject, transpose=True)


@check()
def leading_dimensions_are_kept(subject: Subject) -> None:
    """x may have any leading dimensions, none included, and few rows or many: the product is as close."""
    variant = subject.variants[0]
    for shape in (subject.shape(63, 60), subject.shape(130, 96)):
        qweight = subject.quantized(variant, shape)
        for transpose, leading in product(BOTH_WAYS, LEADING):
            for dtype in DTYPES:
                x = _x(shape, transpose, *leading, dtype=dtype)
                because = f"x is {tuple(x.shape)}, {dtype}, {variant}, the weight {shape}"
                _judge(subject, x, qweight, transpose, because)


@check()
def x_may_be_strided(subject: Subject) -> None:
    """x may be a view: transposed, expanded, every second element, the end of something longer."""
    for variant in subject.variants:
        shape = subject.shape(63, 60)
        qweight = subject.quantized(variant, shape)
        for transpose, dtype in product(BOTH_WAYS, DTYPES):
            for kind, x in _views(shape[0 if transpose else 1], dtype):
                _judge(subject, x, qweight, transpose, f"x is {kind}, {dtype}, {variant}, {shape}")


@check()
def a_product_of_no_rows_is_empty(subject: Subject) -> None:
    """An x of no rows gives a result of no rows, in its dtype."""
    for variant, shape in subject.cases():
        qweight = subject.quantized(variant, shape)
        for transpose, leading in product(BOTH_WAYS, ((0,), (2, 0))):
            for dtype in DTYPES:
                y = matmul(_x(shape, transpose, *leading, dtype=dtype), qweight, transpose)
                expected = (*leading, shape[1 if transpose else 0])
                if tuple(y.shape) != expected or y.dtype != dtype:
                    raise Breach(
                        f"{_name(transpose)} of no rows is {y.dtype} {tuple(y.shape)}, expected {dtype} "
                        f"{expected}"
                    )


@check()
def a_float64_product_is_exact_to_float64(subject: Subject) -> None:
    """For an x in float64 nothing is computed in less: gradients can be checked against differences."""
    for variant, shape in subject.cases():
        qweight = subject.quantized(variant, shape)
        dense = subject.dense(qweight, torch.float64)
        for transpose in BOTH_WAYS:
            x = _x(shape, transpose, ROWS, dtype=torch.float64)
            w = dense if transpose else dense.T
            y = _product(subject, x, qweight, transpose)
            if y.dtype != torch.float64:
                raise Breach(f"{_name(transpose)} is {y.dtype}, expected {x.dtype} ({variant}, {shape})")
            error = float((y - x @ w).norm() / (x.abs() @ w.abs()).norm().clamp(min=1e-300))
            # the bound for a sum of so many products, and for what may be computed beside it
            limit = (len(w) + BESIDE) * torch.finfo(torch.float64).eps
            if not error <= limit:
                raise Breach(
                    f"{_name(transpose)} in float64 is off by {error:.3g} (relative), expected at most "
                    f"{limit:.3g} ({variant}, {shape})"
                )


@check()
def long_sums_are_kept_in_float32(subject: Subject) -> None:
    """Long sums are not accumulated in half precision, forward or transposed."""
    variant = subject.variants[0]
    for transpose, shape in ((False, subject.shape(SHORT, LONG)), (True, subject.shape(LONG, SHORT))):
        qweight = without_data(subject, gaussian(*shape), variant)
        for dtype in (torch.bfloat16, torch.float16):
            for rows in (1, ROWS):
                x = _x(shape, transpose, rows, dtype=dtype)
                because = f"a sum of {LONG}: accumulate in float32; {rows} rows, {dtype}, {variant}"
                _judge(subject, x, qweight, transpose, because)


@check()
def the_core_can_multiply_in_its_place(subject: Subject) -> None:
    """Where `matmul` declines, the core's product over blocks of `dequantize` serves; it is as close."""
    for variant in subject.variants:
        shape = subject.shape(63, 60)
        qweight = subject.quantized(variant, shape)
        exact = subject.dense(qweight, torch.float64)
        for transpose, dtype in product(BOTH_WAYS, DTYPES):
            x = _x(shape, transpose, ROWS, dtype=dtype)

            def block(rows: slice, columns: slice, q: QuantizedWeight = qweight, x: Tensor = x) -> Tensor:
                return dequantize_slice(q, x.dtype, rows, columns)

            y = blockwise_matmul(x, block, shape, transpose, block_elements=shape[0] * shape[1] // 5)
            because = f"by blocks of dequantize(), {dtype}, {variant}, {shape}"
            _compare(y, x, exact, transpose, because)
            through_the_core = matmul(x, qweight, transpose)
            because = f"modq.matmul against the hook, {dtype}, {variant}, {shape}"
            same_bits(_name(transpose), through_the_core, _product(subject, x, qweight, transpose), because)
        for rows, dtype in product((1, 3), DTYPES):  # few enough for what `layout` may have them bound to
            x = _x(shape, False, rows, dtype=dtype)
            because = f"modq.matmul of {rows} rows, {dtype}, {variant}, {shape}"
            _compare(matmul(x, qweight), x, exact, False, because)


# Weights


@check()
def every_row_and_column_is_kept(subject: Subject) -> None:
    """No row or column of a ragged weight has much more than the declared error: no tail is dropped."""
    for variant in subject.defaults:
        limit = LINE * subject.info.max_relative_error[variant.bits]
        for shape in subject.shapes:
            weight = gaussian(*shape)
            left = subject.dense(without_data(subject, weight, variant)) - weight
            for dim, line in enumerate(("column", "row")):
                if shape[dim] < ENOUGH:
                    continue  # the error of few numbers says little
                errors = left.norm(dim=dim) / weight.norm(dim=dim)
                _check_error(
                    f"a {shape} weight, in {line} {int(errors.argmax())},",
                    float(errors.max()),
                    limit,
                    variant,
                )


@check()
def weights_of_any_float_dtype_and_layout_are_taken(subject: Subject) -> None:
    """A half precision weight gives the bits of its float32 copy, a transposed one those of its copy."""
    shape = subject.shape(63, 60)
    for variant in subject.variants:
        weight = gaussian(*shape).half()
        expected = without_data(subject, weight.float(), variant)
        same_weight(f"quantize() of float16 ({variant})", without_data(subject, weight, variant), expected)
        view = weight.float().T.contiguous().T
        same_weight(
            f"quantize() of a transposed view ({variant})", without_data(subject, view, variant), expected
        )
        plain = relative_error(subject, expected, weight)
        for dtype in (torch.bfloat16, torch.float64):
            given = gaussian(*shape).to(dtype)
            error = relative_error(subject, without_data(subject, given, variant), given)
            _check_error(f"a {dtype} weight", error, NEAR * plain, variant)


@check()
def a_weight_of_zeros_stays_near_zero(subject: Subject) -> None:
    """A weight of zeros comes back as zeros or next to nothing, and products with it are finite."""
    shape = subject.shape(63, 60)
    for variant in subject.variants:
        qweight = without_data(subject, torch.zeros(shape), variant)
        largest = float(subject.dense(qweight).abs().max())
        if not largest <= torch.finfo(torch.float16).eps:
            raise Breach(f"Ŵ of a weight of zeros has {largest:.3g}, expected about 0 ({variant})")
        y = _product(subject, gaussian(3, shape[1]), qweight, False)
        if not bool(torch.isfinite(y).all()):
            raise Breach(f"y of a weight of zeros is not finite ({variant})")


@check()
def the_scale_of_a_weight_does_not_matter(subject: Subject) -> None:
    """A weight 100 times smaller or larger has about the same relative error."""
    weight = gaussian(*subject.shape(63, 128))
    for variant in subject.variants:
        plain = relative_error(subject, without_data(subject, weight, variant), weight)
        for scale in USUAL_SCALES:
            error = relative_error(subject, without_data(subject, weight * scale, variant), weight * scale)
            _check_error(f"a weight times {scale:g}", error, NEAR * plain, variant)


@check()
def extreme_weights_are_kept_near_or_refused(subject: Subject) -> None:
    """Tiny or huge weights, or one with an outlier or a row of zeros, are refused or no worse than zeros."""
    plain = gaussian(*subject.shape(63, 128))
    outlier, empty = plain.clone(), plain.clone()
    outlier[3, 5], empty[4] = 100, 0
    weights = {f"a weight times {scale:g}": plain * scale for scale in EXTREME_SCALES}
    weights |= {"a weight with an outlier": outlier, "a weight with a row of zeros": empty}
    for variant in subject.variants:
        usual = relative_error(subject, without_data(subject, plain, variant), plain)
        for kind, weight in weights.items():
            try:
                qweight = without_data(subject, weight, variant)
            except ModqError:
                continue  # said in time is as good
            _check_error(kind, relative_error(subject, qweight, weight), NEAR * max(1.0, usual), variant)


@check()
def calibration_lowers_the_weighted_error(subject: Subject) -> None:
    """With the inputs' second moments H the error tr((W-Ŵ) H (W-Ŵ)ᵀ) is lower than with the identity's."""
    if subject.info.calibration not in ("optional", "hessian"):
        raise NotApplicable(
            f"INFO.calibration is {subject.info.calibration!r}: quantize() is given no Hessian"
        )
    shape = subject.shape(64, 128)
    weight, given = gaussian(*shape), subject.calibration(shape[1])
    assert given is not None  # mypy only: "none" is gone
    assert given.hessian is not None  # mypy only
    for variant in subject.defaults:
        blind = subject.quantize(weight, variant, subject.calibration(shape[1], white=True))
        errors = []
        for qweight in (subject.quantize(weight, variant, given), blind):
            left = subject.dense(qweight, torch.float64) - weight.double()
            errors.append(float(((left @ given.hessian.double()) * left).sum()))
        if not errors[0] < errors[1]:
            raise Breach(
                f"tr((W-Ŵ) H (W-Ŵ)ᵀ) is {errors[0]:.4g} with H, expected less than the {errors[1]:.4g} of a "
                f"backend told that inputs are uncorrelated; is calibration.hessian used? ({variant})"
            )


def _check_products(subject: Subject, transpose: bool) -> None:
    for variant, shape in subject.cases():
        qweight = subject.quantized(variant, shape)
        for dtype in DTYPES:
            x = _x(shape, transpose, ROWS, dtype=dtype)
            _judge(subject, x, qweight, transpose, f"{dtype}, {variant}, the weight {shape}")


def _judge(subject: Subject, x: Tensor, qweight: QuantizedWeight, transpose: bool, because: str) -> None:
    exact = subject.dense(qweight, torch.float64)
    _compare(_product(subject, x, qweight, transpose), x, exact, transpose, because)


def _compare(y: Tensor, x: Tensor, exact: Tensor, transpose: bool, because: str) -> None:
    w = exact if transpose else exact.T
    as_close(_name(transpose), y, x @ w.to(x.dtype), x.double() @ w, because)


def _product(subject: Subject, x: Tensor, qweight: QuantizedWeight, transpose: bool) -> Tensor:
    with torch.no_grad():
        y = subject.hooks.matmul(x=x, qweight=qweight, transpose=transpose)
    if not isinstance(y, Tensor):
        raise Breach(f"matmul() gave {y!r}, expected a tensor, or None to decline")
    return y


def _x(shape: tuple[int, int], transpose: bool, *leading: int, dtype: torch.dtype) -> Tensor:
    return gaussian(*leading, shape[0 if transpose else 1], seed=1, dtype=dtype)


def _name(transpose: bool) -> str:
    return "x @ Ŵ (which gives dX)" if transpose else "y = x @ Ŵ.T"


def _slices(rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    """Yield slices of a matrix: a ragged inner part, one row, one column, one number."""
    inner = [slice(n // 3, n - n // 4) for n in (rows, columns)]
    last = [slice(n - 1, n) for n in (rows, columns)]
    whole = [slice(0, n) for n in (rows, columns)]
    for first, second in ((inner, inner), (inner, whole), (whole, inner), (last, whole), (whole, last)):
        yield first[0], second[1]
    yield last[0], last[1]
    yield slice(rows // 2, rows // 2 + 1), slice(columns // 2, columns // 2 + 1)


def _views(width: int, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield x of this width that are not contiguous, by what they are."""
    yield "transposed", gaussian(width, ROWS, seed=1, dtype=dtype).T
    yield "expanded", gaussian(1, width, seed=1, dtype=dtype).expand(ROWS, width)
    yield "every second column", gaussian(ROWS, 2 * width, seed=1, dtype=dtype)[:, ::2]
    yield "every second row", gaussian(2 * ROWS, width, seed=1, dtype=dtype)[::2]
    yield "the end of longer rows", gaussian(ROWS, width + 3, seed=1, dtype=dtype)[:, 3:]
    yield "of permuted dimensions", gaussian(5, 4, width, seed=1, dtype=dtype).transpose(0, 1)


def _check_own(
    dense: Tensor, shape: tuple[int, ...], dtype: torch.dtype, qweight: QuantizedWeight, because: str
) -> None:
    """Check that a dense weight is what `dequantize` promises, its values apart."""
    if dense.dtype != dtype or tuple(dense.shape) != tuple(shape):
        given = f"{dense.dtype} {tuple(dense.shape)}"
        raise Breach(f"Ŵ is {given}, expected {dtype} {tuple(shape)} ({because})")
    if not dense.is_contiguous():
        raise Breach(f"Ŵ in {dtype} is not contiguous: its strides are {dense.stride()} ({because})")
    held = {tensor.untyped_storage().data_ptr(): name for name, tensor in qweight.tensors.items()}
    if name := held.get(dense.untyped_storage().data_ptr()):
        raise Breach(f"Ŵ in {dtype} shares its memory with {name}; give a copy ({because})")


def _check_rounding(quantity: str, got: Tensor, exact: Tensor, because: str) -> None:
    error = float((got.double() - exact).norm() / exact.norm().clamp(min=1e-300))
    # two roundings, each by at most half of eps, of what was computed in float32
    limit = torch.finfo(got.dtype).eps + 2 * torch.finfo(torch.float32).eps
    if not error <= limit:
        raise Breach(
            f"{quantity} in {got.dtype} is off by {error:.3g} from that in float64, expected at most "
            f"{limit:.3g}: two roundings ({because})"
        )


def _check_slices(subject: Subject, qweight: QuantizedWeight, dtype: torch.dtype, because: str) -> None:
    """Compare slices number by number: where a weight is rotated, its last bits depend on the slice."""
    whole = subject.dense(qweight, dtype)
    limit = 4 * torch.finfo(dtype).eps * float(whole.abs().max())
    for rows, columns in _slices(*qweight.shape):
        place = f"Ŵ[{rows.start}:{rows.stop}, {columns.start}:{columns.stop}]"
        part, expected = dequantize_slice(qweight, dtype, rows, columns), whole[rows, columns]
        _check_own(part, expected.shape, dtype, qweight, f"{place}, {because}")
        error = float((part.double() - expected.double()).abs().max())
        if not error <= limit:
            raise Breach(
                f"{place} in {dtype} differs from the whole Ŵ by up to {error:.3g}, expected at most "
                f"{limit:.3g}: some roundings ({because})"
            )


def _check_error(kind: str, error: float, limit: float, variant: Variant) -> None:
    if math.isnan(error):
        raise Breach(
            f"Ŵ of {kind} has NaN or infinite values; is a scale out of its dtype's range? Clamp it, or "
            f"refuse the weight with a WeightError ({variant})"
        )
    if error > limit:
        raise Breach(
            f"Ŵ of {kind} has the relative error {error:.4g}, expected at most {limit:.4g}, about that of a "
            f"usual one ({variant})"
        )

"""The library functions: right results, and one clear line for what does not fit."""

from dataclasses import replace

import pytest
import torch

import modq
from modq.errors import BackendError, CheckpointError, DtypeError, ShapeError, WeightError


def relative_error(exact, got):
    return ((got.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("transpose", [False, True], ids=["forward", "transpose"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (300,)], ids=str)
def test_matmul_is_as_close_as_the_dense_product(kind, dtype, transpose, leading, generator):
    backend, options = kind
    qweight = modq.quantize(torch.randn(62, 60, generator=generator), backend, **options)
    exact = modq.dequantize(qweight, torch.float64)
    exact = exact if transpose else exact.T
    x = torch.randn(*leading, exact.shape[0], generator=generator).to(dtype)
    want = x.double() @ exact
    got = modq.matmul(x, qweight, transpose)
    assert got.dtype == dtype
    assert got.shape == want.shape
    dense = relative_error(want, x @ exact.to(dtype))
    assert relative_error(want, got) <= 2 * dense + torch.finfo(dtype).eps  # eps: a dense error of 0 is luck


def test_matmul_takes_non_contiguous_inputs(kind, generator):
    backend, options = kind
    qweight = modq.quantize(torch.randn(62, 60, generator=generator), backend, **options)
    x = torch.randn(60, 2, 5, generator=generator).permute(2, 1, 0)
    want = x.double() @ modq.dequantize(qweight, torch.float64).T
    assert relative_error(want, modq.matmul(x, qweight)) < 1e-5


def test_matmul_of_no_rows_is_empty(kind):
    backend, options = kind
    qweight = modq.quantize(torch.ones(62, 60), backend, **options)
    assert modq.matmul(torch.empty(0, 60), qweight).shape == (0, 62)


def test_quantize_leaves_its_input_and_the_global_rng_alone(kind, generator):
    backend, options = kind
    weight = torch.randn(62, 60, generator=generator)
    before, state = weight.clone(), torch.get_rng_state()
    modq.quantize(weight, backend, **options)
    assert torch.equal(weight, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("weight", "error", "said"),
    [
        (torch.ones(4), ShapeError, "expected a non-empty (out_features, in_features)"),
        (torch.ones(2, 4, 4), ShapeError, "(2, 4, 4)"),
        (torch.ones(0, 4), ShapeError, "non-empty"),
        (torch.ones(2, 6), ShapeError, "needs multiples of (2, 4)"),
        (torch.ones(2, 4, dtype=torch.int8), DtypeError, "torch.int8, expected a float dtype"),
        (torch.tensor([[1.0, float("nan")] * 2] * 2), WeightError, "4 NaN"),
        (torch.full((2, 4), float("inf")), WeightError, "8 NaN or infinite"),
    ],
    ids=["vector", "3-d", "empty", "not a multiple", "integers", "NaN", "infinite"],
)
def test_quantize_refuses(weight, error, said):
    with pytest.raises(error) as caught:
        modq.quantize(weight, "toy-bare")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_quantize_asks_for_calibration_where_a_backend_needs_it():
    with pytest.raises(WeightError, match="needs calibration"):
        modq.quantize(torch.ones(2, 4), "toy-calibrated")


@pytest.mark.parametrize(
    ("x", "error", "said"),
    [
        (torch.ones(3, 62), ShapeError, r"expected \(..., 60\): the weight's in_features"),
        (torch.tensor(1.0), ShapeError, r"shape \(\)"),
        (torch.ones(3, 60, dtype=torch.int64), DtypeError, "expected a float dtype"),
    ],
    ids=["other side", "scalar", "integers"],
)
def test_matmul_refuses(x, error, said):
    qweight = modq.quantize(torch.ones(62, 60), "toy-bare")
    with pytest.raises(error, match=said):
        modq.matmul(x, qweight)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda q: {"values": q["values"].half()}, "quantize() and describe() disagree on values"),
        (lambda q: {"other": q["values"]}, "disagree on other"),
        (lambda q: {**q, "scale": torch.ones(2)}, "disagree on scale"),
    ],
    ids=["dtype", "name", "one too many"],
)
def test_a_plugin_that_does_not_keep_its_description_is_named(monkeypatch, change, said):
    import modq_toys_hooks

    whole = modq_toys_hooks.ToyBare.quantize

    def wrong(self, weight):
        made = whole(self, weight)
        return modq.QuantizedWeight(made.backend, 1, made.shape, change(made.tensors))

    wrong = modq.hookimpl(wrong)
    wrong.__name__ = "quantize"
    monkeypatch.setattr(modq_toys_hooks.ToyBare, "quantize", wrong)
    modq.load.cache_clear()
    with pytest.raises(BackendError) as caught:
        modq.quantize(torch.ones(2, 4), "toy-bare")
    modq.load.cache_clear()
    assert said in str(caught.value)


@pytest.mark.parametrize("use", ["dequantize", "matmul"])
def test_a_weight_of_an_unknown_format_never_reaches_the_plugin(use):
    known = modq.quantize(torch.ones(2, 4), "toy-bare")
    newer = replace(known, format_version=2)
    with pytest.raises(CheckpointError, match=r"'toy-bare' are of format 2, expected 1; use the \S+ that"):
        modq.dequantize(newer) if use == "dequantize" else modq.matmul(torch.ones(3, 4), newer)


def test_a_plugin_that_writes_a_format_that_it_does_not_declare_is_named(monkeypatch):
    import modq_toys_hooks

    whole = modq_toys_hooks.ToyBare.quantize

    @modq.hookimpl
    def quantize(self, weight):
        return replace(whole(self, weight), format_version=2)

    monkeypatch.setattr(modq_toys_hooks.ToyBare, "quantize", quantize)
    modq.load.cache_clear()
    with pytest.raises(BackendError, match="a weight of format 2, and its INFO knows"):
        modq.quantize(torch.ones(2, 4), "toy-bare")
    modq.load.cache_clear()

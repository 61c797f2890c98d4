"""The LoRA node: its numbers against dense autograd, and what it saves."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import modq
from modq import lora
from modq.lora import Adapter, lora_linear

NAMES = ["y", "dx", "db", "dA1", "dB1", "dA2", "dB2"]


def layer(kind, out_features=62, in_features=60):
    """A quantized layer and two adapters of other ranks, in float64."""
    backend, options = kind
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(in_features, out_features)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    q = modq.QuantLinear.from_linear(linear, backend, **options).double()
    shapes = [(3, in_features), (out_features, 3), (5, in_features), (out_features, 5)]
    factors = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    return q, factors


def packed(q):
    return [tensor for _, tensor in q.named_packed()]


def run(q, x, bias, factors, dropout=0.0):
    first, second = Adapter(*factors[:2], 1.5, dropout), Adapter(*factors[2:], 0.25, dropout)
    return lora_linear(x, packed(q), q.handle, bias, [first, second])


def dense(q, x, bias, factors, dropout=0.0):
    """What the node stands for, in ordinary autograd."""
    y = F.linear(x, q.dequantize(x.dtype), bias)
    for down, up, scale in [(*factors[:2], 1.5), (*factors[2:], 0.25)]:
        y = y + F.dropout(x, dropout) @ down.T @ up.T * scale
    return y


def leaves(tensors, dtype):
    return [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]


def saved_tensors(function):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        function()
    return saved


def inputs(*leading, width=60, dtype=torch.float64):
    x = torch.randn(*leading, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.to(dtype).requires_grad_()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_and_their_gradients_are_right_in_float64(dropout):
    q, factors = layer(("toy-book", {}), 14, 12)
    x, factors = inputs(2, 3, width=12), leaves(factors, torch.float64)
    bias = q.bias.detach().clone().requires_grad_()

    def seeded(x, bias, *factors):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            return run(q, x, bias, factors, dropout).sin()

    # fast mode compares in one random direction: each entry by itself takes a minute
    assert torch.autograd.gradcheck(seeded, (x, bias, *factors), fast_mode=True)
    assert torch.autograd.gradgradcheck(seeded, (x, bias, *factors), fast_mode=True)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("block_elements", [1 << 18, 130])
def test_it_is_dense_autograd_for_the_same_seed_in_blocks_too(kind, dropout, block_elements, monkeypatch):
    monkeypatch.setattr(lora, "BLOCK_ELEMENTS", block_elements)
    q, factors = layer(kind)
    results = []
    for product in (run, dense):
        x, given = inputs(3, 11), leaves([q.bias, *factors], torch.float64)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            y = product(q, x, given[0], given[1:], dropout)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
        results.append([y.detach(), x.grad, *(tensor.grad for tensor in given)])
    for name, found, expected in zip(NAMES, *results, strict=True):
        torch.testing.assert_close(found, expected, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_as_close_as_dense_autograd_in_these_dtypes(dtype, adapter_dtype):
    q, factors = layer(("toy-affine", {}))
    q.to(dtype)
    factors = [factor.to(adapter_dtype) for factor in factors]
    grad = torch.randn(33, 62, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    results = []
    for product, in_dtype, with_dtype in [
        (run, dtype, adapter_dtype), (dense, dtype, dtype), (dense, torch.float64, torch.float64)
    ]:  # fmt: skip
        x = inputs(33, dtype=dtype).detach().to(in_dtype).requires_grad_()
        given = [*leaves([q.bias], in_dtype), *leaves(factors, with_dtype)]
        y = product(q, x, given[0], given[1:])
        y.backward(grad.to(in_dtype))
        results.append([y.detach(), x.grad, *(tensor.grad for tensor in given)])
    for name, found, naive, exact in zip(NAMES, *results, strict=True):
        rounding = torch.finfo(found.dtype).eps * exact.norm()  # what a result in this dtype cannot avoid
        error, allowed = (found - exact).norm(), 2 * (naive - exact).norm() + rounding
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_saves_x_once_in_its_own_dtype_and_references(kind, dtype):
    q, factors = layer(kind)
    factors, x = leaves(factors, torch.float32), inputs(4, 8, dtype=dtype)
    own = {tensor.data_ptr() for tensor in [*packed(q), *factors]}
    saved = saved_tensors(lambda: run(q, x, q.bias, factors))
    others = [tensor for tensor in saved if tensor.data_ptr() not in own]
    assert own == {tensor.data_ptr() for tensor in saved} - {x.data_ptr()}
    assert [(tensor.data_ptr(), tensor.dtype) for tensor in others] == [(x.data_ptr(), dtype)]


def test_dropout_saves_one_bit_an_entry_more():
    q, factors = layer(("toy-affine", {}))
    factors, x = leaves(factors, torch.float32), inputs(4, 8, dtype=torch.bfloat16)
    own = {tensor.data_ptr() for tensor in [*packed(q), *factors, x]}
    saved = saved_tensors(lambda: run(q, x, q.bias, factors, dropout=0.5))
    masks = [tensor for tensor in saved if tensor.data_ptr() not in own]
    assert [mask.nbytes for mask in masks] == [32 * 8, 32 * 8]  # 60 bits are 8 bytes a row, of two adapters


def test_it_saves_and_computes_only_what_a_gradient_needs():
    q, factors = layer(("toy-affine", {}))
    x = inputs(5)
    of_base = {tensor.data_ptr() for tensor in packed(q)}
    frozen = {tensor.data_ptr() for tensor in saved_tensors(lambda: run(q, x, q.bias, factors))}
    assert x.data_ptr() not in frozen
    trained = leaves(factors, torch.float64)
    first = {tensor.data_ptr() for tensor in saved_tensors(lambda: run(q, x.detach(), None, trained))}
    assert x.data_ptr() in first
    assert not first & of_base
    trained[2].requires_grad_(False)
    run(q, x.detach(), None, trained).sum().backward()
    assert [tensor.grad is None for tensor in trained] == [False, False, True, False]
    assert x.grad is None


@pytest.mark.parametrize("leading", [(), (0,), (2, 0), (1,), (2, 3, 4)])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_any_leading_dimensions_do(leading, dropout):
    q, factors = layer(("toy-affine", {}))
    x, factors = inputs(*leading), leaves(factors, torch.float64)
    y = run(q, x, q.bias, factors, dropout)
    y.sum().backward()
    assert y.shape == (*leading, 62)
    assert x.grad.shape == x.shape
    assert all(bool(factor.grad.any()) == bool(x.numel()) for factor in factors)


def test_a_strided_x_and_an_expanded_gradient_do():
    q, factors = layer(("toy-affine", {}))
    x, factors = inputs(60, width=7).mT, leaves(factors, torch.float64)
    found = torch.autograd.grad(run(q, x, q.bias, factors).sum(), factors)
    expected = torch.autograd.grad(dense(q, x, q.bias, factors).sum(), factors)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_decides_the_dtype_of_the_result_and_not_of_the_gradients(given):
    q, factors = layer(("toy-affine", {}))
    x, factors = inputs(5, dtype=given), leaves(factors, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = run(q, x, q.bias, factors)
        y.float().sum().backward()  # within autocast, as some loops have it
    assert y.dtype == (torch.float64 if given == torch.float64 else torch.bfloat16)
    assert x.grad.dtype == given
    assert {factor.grad.dtype for factor in factors} == {torch.float32}
    exact = dense(q, x.detach().double(), q.bias, [factor.detach().double() for factor in factors])
    assert (y.double() - exact).norm() <= 0.02 * exact.norm()


@pytest.mark.parametrize("width", [1, 7, 8, 9, 60, 64])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_a_mask_comes_back_from_its_bits(rows, width, generator):
    mask = torch.rand(rows, width, generator=generator) < 0.5
    bits = lora._pack(mask)
    assert bits.nbytes == rows * -(-width // 8)
    assert torch.equal(lora._unpack(bits, width), mask)


def test_it_counts_its_runs():
    q, factors = layer(("toy-affine", {}))
    before = lora.calls.copy()
    run(q, inputs(5), q.bias, factors).sum().backward()
    assert lora.calls - before == {"forward": 1, "backward": 1}


def test_an_input_that_does_not_fit_is_refused():
    q, factors = layer(("toy-affine", {}))
    with pytest.raises(modq.errors.ShapeError, match=r"x has shape \(5, 61\), expected \(..., 60\)"):
        run(q, torch.ones(5, 61), q.bias, factors)

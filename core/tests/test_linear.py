"""QuantLinear as a module: what it shows, and that no move changes a packed bit."""

import pytest
import torch
from torch import nn

import modq
from modq.errors import BackendError, RequantizeError, ShapeError


@pytest.fixture
def linear(generator):
    made = nn.Linear(60, 62)
    with torch.no_grad():
        made.weight.copy_(torch.randn(62, 60, generator=generator))
    return made


def packed(layer):
    return {name: tensor.detach().clone() for name, tensor in layer.named_packed()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_it_is_an_nn_linear_without_a_dense_weight(linear, kind):
    q = modq.QuantLinear.from_linear(linear, kind[0], **kind[1])
    assert isinstance(q, nn.Linear)
    assert (q.in_features, q.out_features) == (60, 62)
    assert "weight" not in dict(q.named_parameters())
    assert not list(q.buffers())
    assert not any(tensor.requires_grad for _, tensor in q.named_packed())
    assert all(tensor.dim() > 0 for _, tensor in q.named_packed())


def test_it_computes_the_dequantized_product_and_adds_the_bias(linear, kind, generator):
    q = modq.QuantLinear.from_linear(linear, kind[0], **kind[1])
    x = torch.randn(3, 60, generator=generator)
    assert torch.allclose(q(x), x @ q.dequantize().T + linear.bias, atol=1e-5)


@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.to("cpu", torch.float16),
        lambda m: m.to(torch.bfloat16).float(),
        lambda m: m.eval().train(),
    ],
    ids=["bfloat16", "half", "double", "device and dtype", "and back", "modes"],
)
def test_no_move_changes_a_packed_bit(linear, kind, move):
    q = modq.QuantLinear.from_linear(linear, kind[0], **kind[1])
    before = packed(q)
    assert same(packed(move(q)), before)


def test_the_shown_dtype_follows_a_move(linear):
    q = modq.QuantLinear.from_linear(linear, "toy-affine")
    assert q.to(torch.bfloat16).weight.dtype == torch.bfloat16
    assert q.bias.dtype == torch.bfloat16
    assert q(torch.ones(1, 60)).dtype == torch.float32


def test_state_dict_round_trip_is_bit_exact(linear, kind):
    q = modq.QuantLinear.from_linear(linear, kind[0], **kind[1])
    other = modq.QuantLinear.from_linear(nn.Linear(60, 62), kind[0], **kind[1])
    other.load_state_dict(q.state_dict())
    assert same(packed(other), packed(q))
    assert torch.equal(other(torch.ones(2, 60)), q(torch.ones(2, 60)))


def test_allocated_slots_take_the_tensors_of_a_quantized_layer(linear, kind):
    q = modq.QuantLinear.from_linear(linear, kind[0], **kind[1])
    empty = modq.QuantLinear.like(linear, q.backend, q.options)
    empty.allocate(q.quantized_weight.format_version, q.quantized_weight.meta)
    assert empty.handle == q.handle
    assert all(tensor.device.type == "meta" for _, tensor in empty.named_packed())
    empty.load_state_dict(q.state_dict(), assign=True)
    assert torch.equal(empty(torch.ones(2, 60)), q(torch.ones(2, 60)))


def test_quantized_weight_shares_the_modules_memory(linear):
    q = modq.QuantLinear.from_linear(linear, "toy-affine")
    held = {tensor.data_ptr() for _, tensor in q.named_packed()}
    assert {tensor.data_ptr() for tensor in q.quantized_weight.tensors.values()} == held


def test_a_weight_of_another_shape_is_not_adopted(linear):
    q = modq.QuantLinear.from_linear(linear, "toy-bare")
    with pytest.raises(ShapeError, match=r"\(60, 60\), the layer needs \(62, 60\)"):
        q.adopt(modq.quantize(torch.ones(60, 60), "toy-bare"))


def test_a_backend_that_needs_calibration_refuses_to_requantize(linear):
    calibration = modq.Calibration(hessian=torch.eye(60), samples=1)
    made = modq.quantize(torch.randn(62, 60), "toy-bare")
    q = modq.QuantLinear.like(linear, "toy-calibrated", None)
    q.adopt(modq.QuantizedWeight("toy-calibrated", 1, (62, 60), made.tensors))
    assert calibration.samples == 1
    with pytest.raises(RequantizeError, match=r"merge into a dense model instead: model\.dequantize\(\)"):
        q.weight.data += 1
    assert torch.equal(q.dequantize(), made.tensors["values"])


def test_a_tensor_named_like_an_attribute_of_a_linear_is_refused(linear):
    q = modq.QuantLinear.like(linear, "toy-bare", None)
    with pytest.raises(BackendError, match="may not be named 'in_features'"):
        q.adopt(modq.QuantizedWeight("toy-bare", 1, (62, 60), {"in_features": torch.ones(1)}))


def test_extra_repr_shows_backend_and_options(linear):
    shown = repr(modq.QuantLinear.from_linear(linear, "toy-affine", group_size=16))
    assert "backend='toy-affine'" in shown
    assert "group_size=16" in shown

"""LazyWeight: reads dequantize, writes go through, none edits a temporary."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import modq


@pytest.fixture
def q(generator):
    """A layer over the lossless backend: what is written can be read back exactly."""
    linear = nn.Linear(60, 62)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(62, 60, generator=generator))
    return modq.QuantLinear.from_linear(linear, "toy-bare")


def test_it_looks_like_the_parameter_of_a_dense_layer(q):
    weight = q.weight
    assert isinstance(weight, nn.Parameter)
    assert (weight.shape, weight.dtype, weight.device) == ((62, 60), torch.float32, torch.device("cpu"))
    assert weight.numel() == 62 * 60
    assert not weight.requires_grad
    assert weight.grad is None
    assert len(weight) == 62
    assert "LazyWeight" in repr(weight)


def test_saying_something_of_it_does_not_dequantize(q, monkeypatch):
    dequantized = []
    monkeypatch.setattr(modq.QuantLinear, "dequantize", lambda self, dtype=None: dequantized.append(self))
    weight = q.weight
    weight.shape, weight.dtype, weight.device, weight.ndim, weight.is_cuda, weight.grad, weight.size(0)
    weight.numel(), weight.is_floating_point(), hash(weight), repr(weight), weight.requires_grad_(False)
    assert not dequantized


@pytest.mark.parametrize(
    "read",
    [
        lambda w: w + 1,
        lambda w: w.T.contiguous(),
        lambda w: w[3:5, ::2].clone(),
        lambda w: w.to(torch.bfloat16),
        lambda w: w.float().norm(dim=1),
        lambda w: F.linear(torch.ones(2, 60), w),
        lambda w: torch.ones(2, 62) @ w,
        lambda w: torch.stack([w, w]),
        lambda w: w.detach().clone(),
        lambda w: w.data.clone(),
        lambda w: torch.linalg.svdvals(w),
        lambda w: copy.deepcopy(w),
    ],
    ids=range(12),
)
def test_a_read_gives_what_the_dense_weight_gives(q, read):
    got = read(q.weight)
    assert type(got) is torch.Tensor
    assert torch.equal(got, read(q.dequantize()))


def add_to_data(w):
    w.data += 1


def set_row_of_data(w):
    w.data[0] = 5


def zero_a_view_of_data(w):
    w.data.view(-1)[7:90].zero_()


def assign_data(w):
    w.data = w.data * 2


def add_then_assign(w):
    d = w.data
    d += 1
    w.data = d


def multiply_detached(w):
    w.detach().mul_(2)


def add_to_itself(w):
    with torch.no_grad():
        w.add_(3)


def copy_into_itself(w):
    with torch.no_grad():
        w.copy_(torch.arange(62 * 60.0).view(62, 60))


def fill_a_transposed_view(w):
    with torch.no_grad():
        w.T[3].fill_(2)


def write_by_out(w):
    torch.add(torch.ones(62, 60), 1, out=w.data)


def split_and_write(w):
    for part in w.data.chunk(2):
        part.neg_()


def write_in_inference_mode(w):
    with torch.inference_mode():
        w.data.add_(1)


def initialise(w):
    nn.init.constant_(w, 0.5)


WRITES = [
    add_to_data, set_row_of_data, zero_a_view_of_data, assign_data, add_then_assign, multiply_detached,
    add_to_itself, copy_into_itself, fill_a_transposed_view, write_by_out, split_and_write,
    write_in_inference_mode, initialise,
]  # fmt: skip


@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
def test_a_write_goes_through(q, write):
    dense = nn.Parameter(q.dequantize(), requires_grad=False)
    before = dense.detach().clone()
    write(dense)
    write(q.weight)
    assert not torch.equal(dense, before)
    assert torch.equal(q.dequantize(), dense)


@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
def test_a_layer_trains_on_after_a_write(q, write):
    write(q.weight)
    x = torch.ones(2, 60, requires_grad=True)
    q(x).sum().backward()
    assert torch.allclose(x.grad, torch.ones(2, 62) @ q.dequantize(), atol=1e-3)


def test_adding_in_place_quantizes_once(q):
    before = q.writes
    q.weight.data += 1
    assert q.writes == before + 1


def test_assigning_a_copy_that_another_write_overtook_writes_it(q):
    first = q.weight.data
    first.add_(1)
    wanted = first.clone()
    q.weight.data.zero_()
    q.weight.data = first
    assert torch.equal(q.dequantize(), wanted)


def test_assigning_the_attribute_requantizes(q):
    q.weight = nn.Parameter(torch.full((62, 60), 2.0))
    assert torch.equal(q.dequantize(), torch.full((62, 60), 2.0))


def test_a_write_of_a_lossy_backend_lands_within_its_rounding(generator):
    linear = nn.Linear(60, 62)
    layer = modq.QuantLinear.from_linear(linear, "toy-affine")
    wanted = layer.dequantize() + torch.randn(62, 60, generator=generator)
    layer.weight.data = wanted
    assert torch.equal(layer.dequantize(), modq.dequantize(modq.quantize(wanted, "toy-affine")))


def test_a_copy_that_nobody_writes_to_leaves_the_module_alone(q):
    copied, before = q.weight.data.clone(), q.writes
    copied.add_(1)
    (q.weight.data + 1).add_(1)
    assert q.writes == before

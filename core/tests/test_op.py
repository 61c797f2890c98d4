"""The pair of custom ops: what it saves, differentiates and shares."""

import copy
import pickle

import pluggy
import pytest
import torch
from torch import nn

import modq
from modq import op
from modq.errors import DtypeError, ShapeError
from modq.kernels.cpu import LibraryKernel
from modq.kernels.library import library
from modq.op import first_result, make_handle, stored, stored_specs, unstored
from modq.registry import load
from modq.spec import PROJECT, hookimpl

# torch's own functorch warns of its internals under inductor; nothing of ours is meant
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")


def layer(kind, out_features=62, in_features=60, bias=True):
    backend, options = kind
    linear = nn.Linear(in_features, out_features, bias=bias)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return modq.QuantLinear.from_linear(linear, backend, **options)


def saved_tensors(function):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        function()
    return saved


def test_gradients_are_those_of_the_dense_product_in_float64(kind, generator):
    q = layer(kind, 14, 12).double()
    x = torch.randn(2, 3, 12, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(q, (x,))
    assert torch.autograd.gradgradcheck(lambda t: q(t).sin(), (x,))


def test_lora_gradients_equal_dense_autograd_in_float64(kind, generator):
    q = layer(kind).double()
    dense = q.dequantize(torch.float64)
    x, a, b = (
        torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
        for shape in [(3, 60), (4, 60), (62, 4)]
    )

    def gradients(base):
        loss = (base + x @ a.T @ b.T).square().sum()
        return torch.autograd.grad(loss, (x, a, b))

    for got, want, name in zip(
        gradients(q(x)), gradients(x @ dense.T + q.bias), ("dX", "dA", "dB"), strict=True
    ):
        assert torch.allclose(got, want, rtol=1e-12, atol=1e-12), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_backward_is_as_close_as_the_dense_product(kind, dtype, generator):
    q = layer(kind, 510, 516, bias=False)
    exact = q.dequantize(torch.float64)
    x = torch.randn(33, 516, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(33, 510, generator=generator).to(dtype)
    q(x).backward(grad)
    want = grad.double() @ exact
    dense = (grad @ exact.to(dtype)).double()
    assert (x.grad.double() - want).norm() <= 2 * (dense - want).norm()


def test_eager_saves_nothing_but_references_to_the_packed_tensors(kind):
    q = layer(kind)
    x = torch.ones(5, 60, requires_grad=True)
    own = {tensor.data_ptr() for _, tensor in q.named_packed()}
    saved = saved_tensors(lambda: q(x))
    assert saved
    assert {tensor.data_ptr() for tensor in saved} <= own


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 4, 5])
@torch.no_grad()
def test_few_rows_give_the_bits_that_the_hook_gives(kind, rows, dtype, generator, monkeypatch):
    monkeypatch.setenv("MODQ_FUSED_ROWS", "16")
    q = layer(kind, bias=False)
    for x in torch.randn(3, rows, 1, 60, generator=generator).to(dtype):
        want = load(kind[0]).matmul(x=x, qweight=q.quantized_weight, transpose=False)
        assert torch.equal(q(x), want)
        torch.testing.assert_close(q(x.expand(rows, 2, 60)), want.expand(rows, 2, 62))


@pytest.mark.skipif(library() is None, reason="no compiled kernels here")
@torch.no_grad()
def test_what_few_rows_take_is_looked_up_once_for_each_weight(generator, monkeypatch):
    looked_up = []
    bind = LibraryKernel.bind
    monkeypatch.setattr(LibraryKernel, "bind", lambda *given: looked_up.append(given) or bind(*given))
    monkeypatch.setattr(op, "MOST_BOUND", 3)
    op._resolve.cache_clear()
    layers = [layer(("toy-affine", {})) for _ in range(2)]
    x = torch.randn(1, 60, generator=generator)
    for _ in range(3):
        for each in layers:
            assert torch.allclose(each(x), x @ each.dequantize().T + each.bias, atol=1e-5)
    assert len(looked_up) == 2
    for seed in range(8):  # tensors come and go, at new addresses and at old ones
        weight = torch.randn(62, 60, generator=torch.Generator().manual_seed(seed))
        layers[0].requantize_(weight)
        assert torch.allclose(layers[0](x), x @ layers[0].dequantize().T + layers[0].bias, atol=1e-5)
        assert len(op._resolve(layers[0].handle)._bound) <= 3


@torch.no_grad()
def test_without_kernels_few_rows_are_multiplied_by_the_reference(generator, monkeypatch):
    monkeypatch.setenv("MODQ_KERNELS", "reference")
    op._resolve.cache_clear()
    q = layer(("toy-affine", {}), bias=False)
    x = torch.randn(1, 60, generator=generator)
    assert torch.allclose(q(x), x @ q.dequantize().T, atol=1e-5)
    assert set(op._resolve(q.handle)._bound.values()) == {None}
    op._resolve.cache_clear()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_saves_nothing_but_references_to_the_packed_tensors(backend):
    torch.compiler.reset()
    q = layer(("toy-affine", {}))
    x = torch.ones(5, 60, requires_grad=True)
    compiled = torch.compile(q, fullgraph=True, backend=backend)
    assert torch.allclose(compiled(x), q(x))
    own = {tensor.data_ptr() for _, tensor in q.named_packed()}
    saved = saved_tensors(lambda: compiled(x))
    assert saved
    assert {tensor.data_ptr() for tensor in saved} <= own
    compiled(x).sum().backward()
    assert torch.allclose(x.grad, torch.ones(5, 62) @ q.dequantize(), atol=1e-4)


def test_forty_layers_of_two_shapes_compile_to_two_graphs():
    torch.compiler.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    layers = [layer(("toy-affine", {}), *shape) for shape in [(62, 60), (60, 62)] * 20]
    for q in layers:
        q.compile(fullgraph=True, backend=count)
        q(torch.ones(5, q.in_features))
    assert len(graphs) == 2


@pytest.mark.parametrize(
    ("x", "error", "said"),
    [
        (torch.ones(5, 60, dtype=torch.int64), DtypeError, "x is torch.int64, expected a float dtype"),
        (torch.ones(5, 61), ShapeError, r"x has shape \(5, 61\), expected \(..., 60\)"),
        (torch.ones(()), ShapeError, r"x has shape \(\), expected \(..., 60\)"),
    ],
)
def test_an_input_that_does_not_fit_is_refused(kind, x, error, said):
    with pytest.raises(error, match=said):
        layer(kind)(x)


@pytest.mark.parametrize("leading", [(0,), (2, 0)])
def test_an_input_without_rows_never_reaches_the_backend(kind, leading, monkeypatch):
    q = layer(kind)
    monkeypatch.setattr("modq.op._resolve", None)
    y = q(torch.ones(*leading, 60, dtype=torch.bfloat16))
    assert (tuple(y.shape), y.dtype) == ((*leading, 62), torch.bfloat16)


def test_integers_that_no_collective_takes_are_held_as_bytes():
    tensors = {"codes": torch.arange(-3, 5, dtype=torch.int16).view(2, 4), "index": torch.arange(3)}
    held = stored(tensors)
    assert {name: tensor.dtype for name, tensor in held.items()} == {
        "codes": torch.uint8,
        "index": torch.int64,
    }
    specs = {name: modq.TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    assert {n: modq.TensorSpec(tuple(t.shape), t.dtype) for n, t in held.items()} == stored_specs(specs)
    qweight = modq.QuantizedWeight("toy-bare", 1, (2, 4), tensors)
    again = unstored(list(held.values()), make_handle(qweight))
    assert torch.equal(again.tensors["codes"], tensors["codes"])


def test_opcheck(kind):
    q = layer(kind)
    x = torch.ones(5, 60, requires_grad=True)
    packed = [tensor.data for _, tensor in q.named_packed()]
    torch.library.opcheck(torch.ops.modq.linear.default, (x, packed, q.handle))
    y = torch.ones(5, 62, requires_grad=True)
    torch.library.opcheck(torch.ops.modq.linear_backward.default, (y, packed, q.handle))


def test_a_layer_survives_export_pickle_and_deepcopy(kind):
    q, x = layer(kind), torch.ones(5, 60)
    assert torch.equal(torch.export.export(q, (x,)).module()(x), q(x))
    assert torch.equal(pickle.loads(pickle.dumps(q))(x), q(x))
    assert torch.equal(copy.deepcopy(q)(x), q(x))


@pytest.mark.parametrize("device", ["meta"])
def test_shapes_are_known_without_values(device):
    q = layer(("toy-affine", {})).to(device)
    x = torch.ones(2, 5, 60, device=device, requires_grad=True)
    y = q(x)
    y.sum().backward()
    assert y.shape == (2, 5, 62)
    assert x.grad.shape == x.shape


def test_autocast_decides_the_dtype_of_the_product():
    q, x = layer(("toy-affine", {})), torch.ones(5, 60)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert q(x).dtype == torch.bfloat16
        assert q(x.double()).dtype == torch.float64
    assert q(x).dtype == torch.float32


def test_a_handle_is_a_value_and_holds_all_but_the_tensors(kind, generator):
    backend, options = kind
    first, second = (
        modq.quantize(torch.randn(62, 60, generator=generator), backend, **options) for _ in range(2)
    )
    assert make_handle(first) == make_handle(second)
    again = unstored(list(stored(first.tensors).values()), make_handle(first))
    assert (again.backend, again.shape, again.meta) == (first.backend, first.shape, first.meta)
    assert again.tensors.keys() == first.tensors.keys()
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in first.tensors.items())


def test_stored_tensors_are_bytes_where_they_were_floats(kind):
    backend, options = kind
    q = modq.quantize(torch.ones(62, 60), backend, **options)
    specs = {name: modq.TensorSpec(tuple(t.shape), t.dtype) for name, t in q.tensors.items()}
    held = stored(q.tensors)
    assert not any(tensor.is_floating_point() for tensor in held.values())
    assert {n: modq.TensorSpec(tuple(t.shape), t.dtype) for n, t in held.items()} == stored_specs(specs)
    assert all(held[name].data_ptr() == tensor.data_ptr() for name, tensor in q.tensors.items())


class _Hooks:
    @pluggy.HookspecMarker(PROJECT)(firstresult=True)
    def answer(self, x, y):
        """Answer, or decline with None."""


class _Large:
    @hookimpl
    def answer(self, y):
        return y if y > 10 else None


class _Fallback:
    @hookimpl(trylast=True)
    def answer(self, x, y):
        return -x - y


class _Wrapper:
    @hookimpl(wrapper=True)
    def answer(self):
        answer = yield
        return None if answer is None else 2 * answer


@pytest.mark.parametrize("plugins", [(_Fallback,), (_Large, _Fallback), (_Large,), (_Fallback, _Wrapper)])
def test_hooks_are_called_as_pluggy_calls_them(plugins):
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(_Hooks)
    for plugin in plugins:
        manager.register(plugin())
    hook = manager.hook.answer
    for given in ({"x": 1, "y": 2}, {"x": 1, "y": 20}):
        assert first_result(hook)(**given) == hook(**given)
    assert (first_result(hook) is hook) == (_Wrapper in plugins)

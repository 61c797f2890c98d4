"""LoRA over quantized layers as one autograd node: it runs, it gives what PEFT gives, and else PEFT runs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import Linear
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import modq
import modq.hf.peft
from modq import lora
from modq.hf.peft import fuse_lora

# peft 0.21 asks transformers 5.23 by the old name, at every attachment
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.randint(4, 64, (2, 12), generator=torch.Generator().manual_seed(3))
LAYERS = 14
"""Linears of the tiny Llama's two blocks."""


def adapted(**config: Any) -> Any:
    """A model of one quantized linear with a bias and an adapter that changes something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = nn.Sequential(modq.QuantLinear.from_linear(nn.Linear(64, 48), "nf4"))
        model = get_peft_model(base, LoraConfig(target_modules=["0"], **{"r": 4, **config})).train()
        return perturbed(model)


def perturbed(model: Any) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def tuner(model: Any) -> Any:
    return next(module for module in model.modules() if isinstance(module, Linear))


@contextmanager
def by_peft() -> Iterator[None]:
    """Turn the node off."""
    fuse_lora(False)
    try:
        yield
    finally:
        fuse_lora()


@contextmanager
def runs(forward: int, backward: int | None = None) -> Iterator[None]:
    """Assert how often the node runs."""
    before = lora.calls.copy()
    yield
    found = [lora.calls[way] - before[way] for way in ("forward", "backward")]
    assert found == [forward, forward if backward is None else backward]


def step(model: Any, x: Tensor, **given: Any) -> dict[str, Tensor]:
    """The result and all gradients, drawing from one seed."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        y = model(x, **given)
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad, **gradients}  # type: ignore[dict-item]  # it is there


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare to the rounding of each dtype: the order of sums differs, and PEFT rounds more often."""
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        other = expected[name]
        assert tensor.dtype == other.dtype, name
        error = (tensor.double() - other.double()).norm() / other.double().norm()
        assert error <= 4 * torch.finfo(tensor.dtype).eps, f"{name}: relative distance {error:.1e}"


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("config", [{}, {"lora_dropout": 0.3}, {"use_rslora": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_and_gradients_are_those_of_peft(
    dtype: torch.dtype, config: dict[str, Any], bias: Any
) -> None:
    model = adapted(bias=bias, **config)
    with runs(1):
        found = step(model, inputs(dtype))
    with by_peft(), runs(0):
        expected = step(model, inputs(dtype))
    assert len(found) == 4 + (bias == "all")
    assert_same(found, expected)


def test_several_adapters_each_with_its_dropout_do_as_in_peft() -> None:
    model = adapted(lora_dropout=0.2)
    model.add_adapter("second", LoraConfig(r=6, lora_dropout=0.5, lora_alpha=3, target_modules=["0"]))
    model.base_model.set_adapter(["default", "second"])
    perturbed(model)
    with runs(1):
        found = step(model, inputs(torch.bfloat16))
    with by_peft():
        expected = step(model, inputs(torch.bfloat16))
    assert len(found) == 6
    assert_same(found, expected)


def test_autocast_is_honoured() -> None:
    model = adapted()
    with torch.autocast("cpu", dtype=torch.bfloat16), runs(1):
        found = step(model, inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16), by_peft():
        expected = step(model, inputs())
    assert found["y"].dtype == torch.bfloat16
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype
        assert (tensor - expected[name]).norm() <= 0.02 * expected[name].norm(), name  # bfloat16 all the way


def test_evaluation_runs_it_without_dropout() -> None:
    model = adapted(lora_dropout=0.9).eval()
    with torch.inference_mode(), runs(1, 0):
        found = model(inputs())
    with torch.no_grad(), by_peft():
        expected = model(inputs())
    torch.testing.assert_close(found, expected)


def saved_bytes(model: Any, x: Tensor) -> int:
    """Bytes that autograd keeps beside the model's own."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(size for pointer, size in kept.items() if pointer not in own)


@pytest.mark.parametrize(("dropout", "bits", "of_peft"), [(0.0, 0, 32), (0.1, 1, 64)])
def test_it_keeps_x_and_a_bit_for_dropout_where_peft_keeps_float32(
    dropout: float, bits: int, of_peft: int
) -> None:
    model = adapted(lora_dropout=dropout)
    x = inputs(torch.bfloat16).requires_grad_()
    assert saved_bytes(model, x) == x.numel() * (16 + bits) // 8
    with by_peft():
        assert saved_bytes(model, x) >= x.numel() * of_peft // 8


def _hooked(model: Any) -> None:
    tuner(model).base_layer.register_forward_hook(lambda module, x, y: y * 2)


def _patched(model: Any) -> None:
    forward = tuner(model).lora_A["default"].forward
    tuner(model).lora_A["default"].forward = lambda x: forward(x) * 2


def _parametrized(model: Any) -> None:
    nn.utils.parametrizations.weight_norm(tuner(model).lora_B["default"])


def _of_two_dtypes(model: Any) -> None:
    tuner(model).lora_B["default"].double()
    tuner(model).lora_A["default"].register_forward_hook(lambda module, x, y: y.double())


def _dense(model: Any) -> None:
    layer = tuner(model).base_layer
    dense = nn.Linear(64, 48)
    dense.weight.data, dense.bias = layer.dequantize(), layer.bias
    tuner(model).base_layer = dense.requires_grad_(False)


def _second(model: Any) -> None:
    model.add_adapter("second", LoraConfig(r=6, target_modules=["0"]))
    perturbed(model)


class _OwnLinear(Linear):  # type: ignore[misc]  # peft has no types
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) * 2


NOT_COVERED: dict[str, tuple[dict[str, Any], Callable[[Any], Any], dict[str, Any]]] = {
    "dora": ({"use_dora": True}, lambda model: None, {}),
    "lora_bias": ({"lora_bias": True}, lambda model: None, {}),
    "merged": ({}, lambda model: model.merge_adapter(), {}),
    "disabled": ({}, lambda model: model.base_model.disable_adapter_layers(), {}),
    "mixed batch": ({}, _second, {"adapter_names": ["default", "__base__", "second"]}),
    "a hook": ({}, _hooked, {}),
    "a patched forward": ({}, _patched, {}),
    "a parametrization": ({}, _parametrized, {}),
    "two dtypes": ({}, _of_two_dtypes, {}),
    "a dense base": ({}, _dense, {}),
    "a subclass": ({}, lambda model: setattr(tuner(model), "__class__", _OwnLinear), {}),
}


@pytest.mark.parametrize("name", NOT_COVERED)
def test_what_it_does_not_cover_is_left_to_peft(name: str) -> None:
    config, change, given = NOT_COVERED[name]
    model = adapted(**config)
    with runs(1 if name not in ("dora", "lora_bias") else 0, 0):
        model.train()(inputs())
    change(model)
    model.train(not given)  # PEFT mixes adapters in evaluation mode only
    with runs(0):
        found = step(model, inputs(), **given)
    with by_peft():
        expected = step(model, inputs(), **given)
    for key, tensor in found.items():
        assert torch.equal(tensor, expected[key]), key


# torch's own word on its tracer
@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.trace_method` is deprecated:DeprecationWarning")
def test_what_watches_operations_or_modules_sees_those_of_peft() -> None:
    model, x = adapted(), inputs()
    with runs(0), disable_input_dtype_casting(model):
        model(x)
    with runs(0), FlopCounterMode(display=False):
        model(x)
    with runs(0):
        torch.jit.trace(tuner(model), x, check_trace=False)
    seen: list[nn.Module] = []
    hook = register_module_forward_hook(lambda module, *given: seen.append(module))
    with runs(0):
        model(x)
    hook.remove()
    assert tuner(model).base_layer in seen
    with runs(1, 0):
        model(x)


def test_the_environment_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    monkeypatch.setenv("MODQ_FUSED_LORA", "0")
    importlib.reload(modq.hf.peft)  # wraps nothing twice
    with runs(0):
        model(inputs())
    monkeypatch.delenv("MODQ_FUSED_LORA")
    importlib.reload(modq.hf.peft)
    with runs(1, 0):
        model(inputs())


def test_torch_compile_traces_peft_to_one_graph() -> None:
    torch.compiler.reset()
    model = adapted()
    expected = step(model, inputs())
    with runs(0):
        found = step(torch.compile(tuner(model), fullgraph=True, backend="aot_eager"), inputs())
    torch.testing.assert_close(found["y"], expected["y"])
    torch.testing.assert_close(found["dx"], expected["dx"])


@pytest.fixture
def llama(tiny_llama: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        tiny_llama, quantization_config=modq.ModqConfig("nf4"), dtype=torch.bfloat16
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear")
        return perturbed(get_peft_model(model, config)).train()


def gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_model_trains_on_it_as_without_checkpointing(llama: Any, reentrant: bool) -> None:
    with runs(LAYERS):
        plain = gradients(llama)
    llama.enable_input_require_grads()
    llama.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with runs(2 * LAYERS, LAYERS):
        checkpointed = gradients(llama)
    assert all(bool(gradient.any()) for gradient in plain.values())
    assert all(torch.equal(checkpointed[name], plain[name]) for name in plain)


def test_a_saved_adapter_is_a_plain_one(llama: Any, tmp_path: Path, tiny_llama: Path) -> None:
    with runs(LAYERS):
        gradients(llama)
    llama.save_pretrained(tmp_path / "fused")
    with by_peft():
        gradients(llama)
        llama.save_pretrained(tmp_path / "peft")
        dense = AutoModelForCausalLM.from_pretrained(tiny_llama)
        loaded = PeftModel.from_pretrained(dense, tmp_path / "fused")
    files = [(tmp_path / kind / "adapter_model.safetensors") for kind in ("fused", "peft")]
    assert files[0].read_bytes() == files[1].read_bytes()
    stored = load_file(files[0])
    assert len(stored) == 2 * LAYERS
    state = {name.replace(".default", ""): tensor for name, tensor in loaded.state_dict().items()}
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())

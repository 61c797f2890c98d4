"""Tuning over whole blocks: nearer to the dense block on samples that it has not seen, or nothing at all."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import modq
from modq.errors import OptionError
from modq.model import quantized_layers
from modq.spec import BlockCalibration
from modq_quipsharp.options import Options
from modq_quipsharp.tuning import ScaledLinear, tune_block

TOKENS = {"vocab_size": 64, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
MODELS: dict[str, tuple[Any, Any]] = {
    "llama": (
        LlamaForCausalLM,
        LlamaConfig(
            **TOKENS, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.1, tie_word_embeddings=False, attention_bias=True,
        ),
    ),
    "gpt2": (GPT2LMHeadModel, GPT2Config(**TOKENS, n_embd=64, n_layer=1, n_head=4, initializer_range=0.1)),
    "t5": (
        T5ForConditionalGeneration,
        T5Config(
            **TOKENS, d_model=64, d_kv=16, d_ff=88, num_layers=1, num_heads=4,
            feed_forward_proj="gated-gelu", decoder_start_token_id=0,
        ),
    ),
}  # fmt: skip
TUNED = {"bits": 2, "tune_iters": 1, "tune_epochs": 4, "tune_lr": 4e-3}
UNTUNED = {**TUNED, "tune_epochs": 0}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def model(architecture: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    cls, config = MODELS[architecture]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls(copy.deepcopy(config)).to(dtype).eval()


def samples(count: int = 12, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, 64, (1, 24), generator=generator) for _ in range(count)]


def quantized(architecture: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return modq.quantize_model(model(architecture, dtype), "quipsharp", calibration=samples(), **options)


@pytest.fixture(scope="module")
def untuned() -> Any:
    return quantized(**UNTUNED)


@pytest.fixture(scope="module")
def tuned() -> Any:
    return quantized(**TUNED)


def first_block(its: Any, given: list[Tensor]) -> list[Tensor]:
    """What the first block returns: it is given the same by every model."""
    found: list[Tensor] = []
    handle = its.model.layers[0].register_forward_hook(lambda _, args, output: found.append(output))
    with torch.no_grad():
        for ids in given:
            its(ids)
    handle.remove()
    return found


def loss(its: Any, given: list[Tensor]) -> float:
    pairs = zip(first_block(its, given), first_block(model(), given), strict=True)
    return float(torch.stack([(one - other).square().mean() for one, other in pairs]).mean())


def test_it_comes_nearer_to_the_dense_block_on_samples_it_has_not_seen(untuned: Any, tuned: Any) -> None:
    unseen = samples(8, seed=1)
    assert loss(tuned, unseen) < 0.98 * loss(untuned, unseen)


def test_scale_vectors_and_the_blocks_own_vectors_move_and_codes_stay(untuned: Any, tuned: Any) -> None:
    state, random_state = untuned.state_dict(), torch.get_rng_state()
    its = quantized(**TUNED)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in its.parameters())
    packed = [tensor for _, layer in quantized_layers(its) for _, tensor in layer.named_packed()]
    assert not any(tensor.requires_grad for tensor in packed)
    moved = {name for name, tensor in its.state_dict().items() if not torch.equal(tensor, state[name])}
    assert {name.rpartition(".")[2] for name in moved if name.startswith("model.layers.0.")} == {
        "input_scales",
        "output_scales",
        "weight",  # of norms
        "bias",
    }
    assert all(name.startswith("model.layers.") for name in moved)
    again = tuned.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in its.state_dict().items())


def test_what_is_not_better_is_not_taken(untuned: Any) -> None:
    expected, found = untuned.state_dict(), quantized(**{**TUNED, "tune_lr": 50.0}).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_the_best_epoch_is_kept_where_later_ones_are_worse(untuned: Any) -> None:
    one, three = (
        quantized(**{**TUNED, "tune_lr": 0.015, "tune_epochs": epochs}).state_dict() for epochs in (1, 3)
    )
    assert all(torch.equal(tensor, three[name]) for name, tensor in one.items())
    assert any(not torch.equal(tensor, one[name]) for name, tensor in untuned.state_dict().items())


@pytest.mark.parametrize(
    ("architecture", "dtype"), [("gpt2", torch.float32), ("t5", torch.float32), ("llama", torch.bfloat16)]
)
def test_other_architectures_and_dtypes_are_tuned(architecture: str, dtype: torch.dtype) -> None:
    expected, found = (quantized(architecture, dtype, **options).state_dict() for options in (UNTUNED, TUNED))
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        name: tensor.dtype for name, tensor in expected.items()
    }
    moved = [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])]
    assert any(name.endswith("input_scales") for name in moved)
    assert any("ln_" in name or "norm" in name for name in moved)


def test_a_tuned_model_saves_and_loads_again(tuned: Any, tmp_path: Path) -> None:
    tuned.save_pretrained(tmp_path)
    loaded, ids = AutoModelForCausalLM.from_pretrained(tmp_path), samples(1)[0]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, tuned(ids).logits)
    layer = loaded.model.layers[0].self_attn.q_proj
    assert layer.options == Options(**TUNED)
    assert layer.quantized_weight.tensors["input_scales"].abs().unique().numel() > 2


def test_only_linears_whose_options_ask_for_it_are_tuned() -> None:
    layers = {"mlp": {"tune_epochs": 0}, "v_proj": {"backend": "nf4"}, "o_proj": None}
    its = modq.quantize_model(model(), "quipsharp", calibration=samples(), layers=layers, **TUNED)
    signs = {
        name.rpartition(".")[2]: bool((layer.quantized_weight.tensors["input_scales"].abs() == 1).all())
        for name, layer in quantized_layers(its.model.layers[0])
        if layer.backend == "quipsharp"
    }
    tuned = {"q_proj": False, "k_proj": False}
    assert signs == {**tuned, "gate_proj": True, "up_proj": True, "down_proj": True}


def test_without_epochs_no_sample_is_run() -> None:
    def refuse(*_: Any) -> Tensor:
        raise AssertionError("a sample is run")

    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    given = BlockCalibration(
        block=nn.Sequential(nn.Linear(32, 16)),
        quantized={"0": modq.quantize(weight, "quipsharp")},
        layers={},
        samples=3,
        run=refuse,
        target=refuse,
    )
    assert tune_block({"0": weight}, {"0": Options()}, given) is None
    with pytest.raises(AssertionError, match="a sample is run"):
        tune_block({"0": weight}, {"0": Options(tune_epochs=1)}, given)


def test_one_sample_is_too_few() -> None:
    with pytest.raises(OptionError) as error:
        modq.quantize_model(model(), "quipsharp", calibration=samples(1), **TUNED)
    said = "tune_epochs=4 holds one calibration sample in three out and was given 1, expected at least 2"
    assert str(error.value) == f"model.layers.0: {said}; give more, or leave it out"


@pytest.mark.parametrize("given", [{"tune_epochs": -1}, {"tune_lr": 0.0}, {"tune_lr": float("inf")}], ids=str)
def test_options_out_of_range_are_said(given: dict[str, Any]) -> None:
    (name,) = given
    with pytest.raises(OptionError, match=f"{name}=.*expected"):
        modq.quantize(torch.ones(8, 8), "quipsharp", **given)


@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_that_is_trained_is_the_layer_that_is_stored(bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(40, 24, bias=bias)
    for parameter in linear.parameters():
        nn.init.normal_(parameter, generator=generator)
    layer = modq.QuantLinear.from_linear(linear, "quipsharp", bits=3)
    qweight = layer.quantized_weight
    vectors = [
        (qweight.tensors[name] * torch.rand(n, generator=generator)).half().double().requires_grad_()
        for name, n in (("input_scales", 40), ("output_scales", 24))
    ]
    x = torch.randn(2, 3, 40, generator=generator, dtype=torch.float64)

    def forward(inputs: Tensor, outputs: Tensor) -> Tensor:
        return ScaledLinear(layer, linear.weight, qweight, inputs, outputs)(x)

    stored = copy.deepcopy(layer)
    held = {"input_scales": vectors[0].detach().half(), "output_scales": vectors[1].detach().half()}
    stored.adopt(modq.QuantizedWeight("quipsharp", 1, (24, 40), {**qweight.tensors, **held}, qweight.meta))
    torch.testing.assert_close(forward(*vectors), stored(x))
    assert torch.autograd.gradcheck(forward, vectors)

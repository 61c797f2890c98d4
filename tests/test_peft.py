"""The PEFT canary: its tuners train, merge and unmerge over quantized layers as they do over dense ones."""

from __future__ import annotations

import copy
import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import modq
from modq.errors import RequantizeError, WeightError
from modq.hf.peft import wrap_peft
from modq.model import quantized_layers

sys.path.insert(0, str(Path(__file__).parents[1] / "core" / "tests" / "backends"))  # toy-bare, toy-calibrated

pytestmark = [
    # peft 0.21 asks transformers 5.23 by the old name, at every attachment
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # once a process, where SHiRA makes its first sparse delta
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
    # PEFT says so of dividing by the scale that it multiplied with; over a QuantLinear nothing is divided
    pytest.mark.filterwarnings("ignore:Unmerge result can be inaccurate:UserWarning"),
]

ALL = "all-linear"
SOME = ["q_proj", "v_proj", "down_proj"]
IDS = torch.randint(4, 64, (2, 12), generator=torch.Generator().manual_seed(3))

CODES = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.codes"

ROUNDING = 1e-5
"""Relative distance of two ways to compute one thing in float32, through the two layers of the model."""


def lora(**more: Any) -> LoraConfig:
    return LoraConfig(r=4, target_modules=ALL, **more)


TUNERS: dict[str, Callable[[], Any]] = {
    "lora": lora,
    "rslora": lambda: lora(use_rslora=True),
    "dora": lambda: lora(use_dora=True),
    "pissa": lambda: lora(init_lora_weights="pissa"),
    "olora": lambda: lora(init_lora_weights="olora"),
    "modules_to_save": lambda: lora(modules_to_save=["lm_head"]),
    "trainable_tokens": lambda: lora(trainable_token_indices=[5, 7]),
    "ia3": lambda: peft.IA3Config(target_modules=SOME, feedforward_modules=["down_proj"]),
    "vera": lambda: peft.VeraConfig(target_modules=SOME, r=4),
    "loha": lambda: peft.LoHaConfig(target_modules=SOME, r=4),
    "lokr": lambda: peft.LoKrConfig(target_modules=SOME, r=4),
    "oft": lambda: peft.OFTConfig(target_modules=SOME, r=0, oft_block_size=16),
    "boft": lambda: peft.BOFTConfig(target_modules=SOME, boft_block_size=4),
    "adalora": lambda: peft.AdaLoraConfig(target_modules=SOME, total_step=10),
}
"""What the promise is about."""

MORE_TUNERS: dict[str, Callable[[], Any]] = {
    "pissa_niter_4": lambda: lora(init_lora_weights="pissa_niter_4"),
    "orthogonal": lambda: lora(init_lora_weights="orthogonal"),
    "mica": lambda: lora(init_lora_weights="mica"),
    "fourierft": lambda: peft.FourierFTConfig(target_modules=SOME, n_frequency=50),
    "waveft": lambda: peft.WaveFTConfig(target_modules=SOME, n_frequency=50),
    "hra": lambda: peft.HRAConfig(target_modules=SOME),
    "hira": lambda: peft.HiraConfig(target_modules=SOME, r=4),
    "miss": lambda: peft.MissConfig(target_modules=SOME, r=4),
    "vblora": lambda: peft.VBLoRAConfig(target_modules=SOME, vector_length=32),
    "randlora": lambda: peft.RandLoraConfig(target_modules=SOME, r=4),
    "road": lambda: peft.RoadConfig(target_modules=SOME, group_size=16),
    "delora": lambda: peft.DeloraConfig(target_modules=SOME, r=4),
    "shira": lambda: peft.ShiraConfig(target_modules=SOME, r=4),
    "c3a": lambda: peft.C3AConfig(target_modules=SOME, block_size=32),
    "gralora": lambda: peft.GraloraConfig(target_modules=SOME, r=8),
    "pvera": lambda: peft.PveraConfig(target_modules=SOME, r=4),
    "psoft": lambda: peft.PsoftConfig(target_modules=SOME, r=4),
    "peanut": lambda: peft.PeanutConfig(target_modules=SOME),
}
"""The rest of PEFT's that can merge: not promised, and known to work."""


@pytest.fixture(autouse=True)
def _no_cuda_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT would try to compile one for BOFT, and warn at length."""
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)


@pytest.fixture
def load(tiny_llama: Path) -> Callable[..., Any]:
    """`load("nf4", ...)`: the tiny model, quantized on the way."""

    def loaded(
        backend: str = "nf4", folder: Path = tiny_llama, dtype: Any = torch.float32, **more: Any
    ) -> Any:
        config = modq.ModqConfig(backend, **more)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config)

    return loaded


def attach(model: nn.Module, config: Any) -> Any:
    """Put a trained-looking adapter on: fresh ones are made to change nothing, and starve each other's
    gradients.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return perturb(get_peft_model(model, config).eval())


def perturb(model: Any, seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable(model).values():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(0.1 * (parameter.abs().mean() + 0.3) * noise)
    return model


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def tuner_layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def dense_twin(model: Any) -> Any:
    """Copy the adapted model, with a dense layer of equal weight in the place of each quantized one."""
    twin = copy.deepcopy(model)
    for name, layer in list(quantized_layers(twin)):
        dense = nn.Linear(
            layer.in_features, layer.out_features, layer.bias is not None, dtype=layer.compute_dtype
        )
        dense.requires_grad_(False)
        dense.weight.copy_(layer.dequantize())
        if layer.bias is not None:
            dense.bias = layer.bias
        twin.set_submodule(name, dense)
    return twin


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Everything that a merge may write to: packed tensors and biases."""
    return {
        f"{name}.{key}": tensor.detach().clone()
        for name, layer in quantized_layers(model)
        for key, tensor in layer.named_parameters(recurse=False)
    }


def assert_same_bits(model: nn.Module, before: dict[str, Tensor]) -> None:
    now = bits(model)
    assert now.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(now[name], tensor), name


# Training


@pytest.mark.parametrize("tuner", TUNERS)
def test_every_adapter_tensor_gets_the_gradient_that_it_gets_over_dense_layers(tuner, load):
    model = attach(load(), TUNERS[tuner]())
    twin = dense_twin(model)
    for each in (model, twin):
        each(IDS, labels=IDS).loss.backward()
    expected = trainable(twin)
    assert trainable(model).keys() == expected.keys()
    for name, parameter in trainable(model).items():
        assert parameter.grad is not None, name
        assert parameter.grad.norm() > 0, name
        assert distance(parameter.grad, expected[name].grad) < ROUNDING, name
    assert not [name for name in trainable(model) if "codes" in name or "scales" in name]


@pytest.mark.parametrize("tuner", ["lora", "rslora", "vera", "loha", "oft", "adalora"])
def test_a_fresh_adapter_changes_nothing(tuner, load):
    model = load()
    before = logits(model)
    assert distance(logits(get_peft_model(model, TUNERS[tuner]()).eval()), before) < ROUNDING


@pytest.mark.parametrize("tuner", ["pissa", "olora"])
def test_an_adapter_that_takes_its_start_out_of_the_weight_leaves_the_rest_in_the_base(tuner, load):
    model = load("toy-bare")
    before = logits(model)
    adapted = get_peft_model(model, TUNERS[tuner]()).eval()
    assert distance(logits(adapted), before) < ROUNDING
    with adapted.disable_adapter():
        assert distance(logits(adapted), before) > 0.05


def test_all_linear_finds_the_quantized_layers_and_no_others(load):
    model = load()
    quantized = {name for name, _ in quantized_layers(model)}
    assert len(quantized) == 14
    adapted = get_peft_model(model, lora())
    assert {name.removeprefix("base_model.model.") for name in tuner_layers(adapted)} == quantized


# Merging


@pytest.mark.parametrize("tuner", [*TUNERS, *MORE_TUNERS])
@pytest.mark.parametrize("safe_merge", [False, True], ids=["plain", "safe"])
def test_a_lossless_backend_merges_without_loss(tuner, safe_merge, load):
    model = attach(load("toy-bare"), {**TUNERS, **MORE_TUNERS}[tuner]())
    before, adapted = bits(model), logits(model)
    model(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad.norm() > 0 for parameter in trainable(model).values())
    with model.disable_adapter():
        assert distance(logits(model), adapted) > 1e-3
    model.merge_adapter(safe_merge=safe_merge)
    assert all(layer.merged for layer in tuner_layers(model).values())
    assert distance(logits(model), adapted) < ROUNDING
    model.unmerge_adapter()
    assert_same_bits(model, before)
    assert torch.equal(logits(model), adapted)


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("safe_merge", [False, True], ids=["plain", "safe"])
def test_a_merge_rounds_the_exact_result_once_and_an_unmerge_gives_every_bit_back(tuner, safe_merge, load):
    model = attach(load(), TUNERS[tuner]())
    twin = dense_twin(model)
    before, adapted = bits(model), logits(model)
    for each in (model, twin):
        each.merge_adapter(safe_merge=safe_merge)
    assert_requantized(model, twin)
    assert distance(logits(model), logits(twin)) < ROUNDING  # the twin now has the rounded weights
    model.unmerge_adapter()
    assert_same_bits(model, before)
    assert torch.equal(logits(model), adapted)


def assert_requantized(model: nn.Module, twin: nn.Module) -> None:
    """The codes are those of the twin's merged dense weights, which get rounded here."""
    adapted = [(name, layer) for name, layer in quantized_layers(model) if name.endswith("base_layer")]
    assert adapted
    for name, layer in adapted:
        dense = twin.get_submodule(name)
        expected = modq.quantize(dense.weight, "nf4")
        for key, tensor in layer.quantized_weight.tensors.items():
            assert torch.equal(tensor, expected.tensors[key]), f"{name}.{key}"
        dense.weight.data = modq.dequantize(expected, dense.weight.dtype)


@pytest.mark.parametrize("tuner", ["lora", "dora"])
def test_a_bfloat16_model_merges_as_the_dense_one_does(tuner, load):
    model = attach(load(dtype=torch.bfloat16), TUNERS[tuner]())
    twin = dense_twin(model)
    before, adapted = bits(model), logits(model)
    model.merge_adapter()
    twin.merge_adapter()
    assert_requantized(model, twin)
    model.unmerge_adapter()
    assert_same_bits(model, before)
    assert torch.equal(logits(model), adapted)


def two_adapters(model: nn.Module) -> Any:
    adapted = attach(model, lora())
    adapted.add_adapter("second", lora(init_lora_weights=False))
    adapted.base_model.set_adapter(["default", "second"])
    return perturb(adapted, seed=2)


def test_two_adapters_merged_in_one_go_round_once(load):
    model = two_adapters(load())
    twin = dense_twin(model)
    before, adapted = bits(model), logits(model)
    assert distance(adapted, logits(twin)) < ROUNDING
    for each in (model, twin):
        each.merge_adapter(["default", "second"])
    assert_requantized(model, twin)
    assert all(layer.merged_adapters == ["default", "second"] for layer in tuner_layers(model).values())
    model.unmerge_adapter()
    assert_same_bits(model, before)
    assert torch.equal(logits(model), adapted)


@pytest.mark.filterwarnings(
    "ignore:Already following adapters were merged:UserWarning"
)  # PEFT's note, meant here
def test_two_adapters_merged_one_after_the_other_come_off_together(load):
    model = two_adapters(load())
    before, adapted = bits(model), logits(model)
    model.merge_adapter(["default"])
    model.merge_adapter(["second"], safe_merge=True)
    model.unmerge_adapter()
    assert_same_bits(model, before)
    assert torch.equal(logits(model), adapted)


def test_a_model_trains_on_after_it_was_merged_and_unmerged_in_inference_mode(load):
    model = attach(load(), lora())
    before = bits(model)
    with torch.inference_mode():
        model.merge_adapter()
        model.unmerge_adapter()
    assert_same_bits(model, before)
    model(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad.norm() > 0 for parameter in trainable(model).values())


def test_merging_again_after_an_unmerge_gives_the_same_codes(load):
    model = attach(load(), lora())
    model.merge_adapter()
    merged = bits(model)
    model.unmerge_adapter()
    model.merge_adapter()
    assert_same_bits(model, merged)


def test_disabling_a_merged_adapter_unmerges_it(load):
    base = load()
    plain = logits(base)
    model = attach(base, lora())
    before, adapted = bits(model), logits(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    assert_same_bits(model, before)
    assert torch.equal(logits(model), adapted)


def test_a_merged_model_that_is_copied_or_cast_still_unmerges(load):
    model = attach(load(), lora())
    before = bits(model)
    model.merge_adapter()
    merged = bits(model)
    other = copy.deepcopy(model).to(torch.bfloat16)
    other.unmerge_adapter()
    assert_same_bits(other, before)
    assert_same_bits(model, merged)


@pytest.mark.parametrize("tuner", ["ia3", "lora_bias"])
def test_an_unmerge_gives_the_bias_back_too(tuner, load, tiny):
    configs = {
        "ia3": peft.IA3Config(target_modules=["q_proj", "k_proj"], feedforward_modules=[]),
        "lora_bias": LoraConfig(r=4, target_modules=["q_proj", "k_proj"], lora_bias=True),
    }
    model = attach(load(folder=tiny("qwen2")), configs[tuner])
    before, adapted = bits(model), logits(model)
    assert any(name.endswith("q_proj.base_layer.bias") for name in before)
    model.merge_adapter()
    assert not torch.equal(
        *(
            b["base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias"]
            for b in (bits(model), before)
        )
    )
    model.unmerge_adapter()
    assert_same_bits(model, before)
    assert torch.equal(logits(model), adapted)


# What a merge leaves behind


def test_a_merged_and_unloaded_model_saves_and_reloads(load, tmp_path):
    model = attach(load(), lora())
    model.merge_adapter()
    keys = model.state_dict().keys()
    model.unmerge_adapter()
    assert model.state_dict().keys() == keys  # what is kept for the unmerge is in no file
    merged = model.merge_and_unload()
    assert not tuner_layers(merged)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(merged))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not [key for key in file.keys() if "lora" in key or "base_layer" in key]  # noqa: SIM118  # no mapping


def test_unloading_drops_the_tensors_from_before_the_merge(load):
    model = attach(load(), lora())
    originals = [
        weakref.ref(tensor) for _, layer in quantized_layers(model) for _, tensor in layer.named_packed()
    ]
    merged = model.merge_and_unload()
    del model
    gc.collect()
    assert len(originals) == 14 * 4
    assert not any(original() is not None for original in originals)
    assert len(list(quantized_layers(merged))) == 14


# Where nothing may merge in place


@pytest.fixture
def partly_calibrated(load, tiny_llama):
    """A model with an nf4 layer before each adapted one of a backend that cannot make codes by itself."""
    model = load(layers={"down_proj": None})
    for name, linear in list(model.named_modules()):
        if name.endswith("down_proj"):
            data = modq.Calibration(hessian=torch.eye(linear.in_features), samples=1)
            model.set_submodule(name, modq.QuantLinear.from_linear(linear, "toy-calibrated", data))
    return model


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_a_backend_that_needs_calibration_refuses_before_anything_has_changed(merge, partly_calibrated):
    model = attach(partly_calibrated, lora())
    before, adapted, layers = bits(model), logits(model), tuner_layers(model).keys()
    with pytest.raises(RequantizeError, match=r"'toy-calibrated'.*model\.dequantize\(\)") as raised:
        getattr(model, merge)()
    assert "\n" not in str(raised.value)
    assert_same_bits(model, before)
    assert torch.equal(logits(model), adapted)
    assert tuner_layers(model).keys() == layers
    assert not any(layer.merged for layer in tuner_layers(model).values())


def test_what_leaves_the_calibrated_layers_alone_is_not_refused(partly_calibrated):
    model = attach(partly_calibrated, LoraConfig(r=4, target_modules=["q_proj"]))
    model.add_adapter("on_all", lora())
    before = bits(model)
    model.merge_adapter(["default"])
    assert not torch.equal(bits(model)[CODES], before[CODES])
    with pytest.raises(RequantizeError):
        model.merge_adapter(["on_all"])
    model.unload()


def test_merging_into_a_dense_model_is_the_way_out(partly_calibrated, tmp_path):
    model = attach(partly_calibrated, lora())
    adapted = logits(model)
    model.save_pretrained(tmp_path)
    dense = model.unload().dequantize()
    assert not list(quantized_layers(dense))
    merged = PeftModel.from_pretrained(dense, tmp_path).merge_and_unload()
    assert distance(logits(merged), adapted) < ROUNDING
    assert type(merged.model.layers[0].mlp.down_proj) is nn.Linear


@pytest.mark.parametrize(("safe_merge", "error"), [(True, ValueError), (False, WeightError)])
def test_a_merge_that_fails_leaves_its_layer_as_it_was(safe_merge, error, load):
    model = two_adapters(load())
    (name, layer), before = next(iter(tuner_layers(model).items())), bits(model)
    nn.init.constant_(layer.lora_A["second"].weight, torch.nan)
    with pytest.raises(error, match="NaN"):
        model.merge_adapter(safe_merge=safe_merge)
    assert layer.merged_adapters == [], name
    assert_same_bits(model, before)


# Adapters as PEFT has them


def test_the_saved_adapter_is_plain_peft_and_loads_on_the_dense_model(load, tmp_path):
    model = attach(load(), lora())
    adapted = logits(model)
    model.save_pretrained(tmp_path)
    assert "modq" not in json.dumps(json.loads((tmp_path / "adapter_config.json").read_text()))
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        shapes = {key: tuple(file.get_tensor(key).shape) for key in file.keys()}  # noqa: SIM118  # no mapping
    assert len(shapes) == 28
    assert shapes["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"] == (4, 96)
    again = PeftModel.from_pretrained(load(), tmp_path)
    assert torch.equal(logits(again), adapted)
    dense = PeftModel.from_pretrained(load().dequantize(), tmp_path)
    assert distance(logits(dense), adapted) < ROUNDING


@pytest.mark.parametrize("backend", ["nf4", "toy-bare"])
def test_an_adapter_of_a_quantized_conv1d_loads_on_the_dense_one(backend, load, tiny, tmp_path):
    model = attach(load(backend, folder=tiny("gpt2")), lora())
    adapted = logits(model)
    model.save_pretrained(tmp_path)
    dense = load(backend, folder=tiny("gpt2")).dequantize()
    with pytest.warns(UserWarning, match="fan_in_fan_out"):  # which PEFT turns over for Conv1D
        dense = PeftModel.from_pretrained(dense, tmp_path)
    assert distance(logits(dense), adapted) < ROUNDING
    assert distance(logits(dense.merge_and_unload()), adapted) < ROUNDING


def test_several_adapters_are_switched_and_combined(load):
    model = attach(load(), lora())
    model.add_adapter("second", lora(init_lora_weights=False))
    first = logits(model)
    model.set_adapter("second")
    second = logits(model)
    assert distance(second, first) > 1e-3
    model.add_weighted_adapter(["default", "second"], [1.0, 0.0], "mixed", combination_type="svd", svd_rank=4)
    model.set_adapter("mixed")
    assert distance(logits(model), first) < 1e-4  # the SVD of a rank 4 delta in float32
    model.merge_adapter()
    model.unmerge_adapter()
    model.set_adapter("default")
    model.delete_adapter("mixed")
    assert torch.equal(logits(model), first)


def test_one_batch_may_use_several_adapters(load):
    model = attach(load(), lora())
    first = logits(model)
    model.add_adapter("second", lora(init_lora_weights=False))
    with torch.no_grad():
        mixed = model(IDS, adapter_names=["default", "__base__"]).logits
    with model.disable_adapter():
        base = logits(model)
    assert distance(mixed[0], first[0]) < ROUNDING
    assert distance(mixed[1], base[1]) < ROUNDING


def test_transformers_own_adapters_train_and_save(load, tmp_path):
    model = load()
    model.add_adapter(lora(init_lora_weights=False))
    model(IDS, labels=IDS).loss.backward()
    assert len(trainable(model)) == 28
    assert all(parameter.grad.norm() > 0 for parameter in trainable(model).values())
    adapted = logits(model.eval())
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert torch.equal(logits(PeftModel.from_pretrained(load(), tmp_path)), adapted)
    model.disable_adapters()
    assert torch.equal(logits(model), logits(load()))


# What the wrapping of merge and unmerge does to others


@pytest.mark.parametrize("tuner", ["lora", "dora", "ia3", "oft"])
def test_dense_layers_merge_as_if_modq_were_not_there(tuner, tiny_llama):
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    model = attach(dense, TUNERS[tuner]())
    other = copy.deepcopy(model)
    steps = {"merge": lambda m: m.merge_adapter(), "unmerge": lambda m: m.unmerge_adapter()}
    for step, run in steps.items():
        run(model)
        for layer in tuner_layers(other).values():
            getattr(type(layer), step).__wrapped__(layer)  # PEFT's own
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]), (step, name)
        assert all(
            vars(layer).keys() == vars(tuner_layers(other)[name]).keys()
            for name, layer in tuner_layers(model).items()
        )


def test_wrapping_twice_is_wrapping_once():
    before = {cls: (cls.merge, cls.unmerge) for cls in [peft.tuners.lora.Linear, peft.tuners.ia3.Linear]}
    wrap_peft()
    for cls, methods in before.items():
        assert (cls.merge, cls.unmerge) == methods
        assert not hasattr(cls.merge.__wrapped__, "__wrapped__")
    assert peft.tuners.lora.Linear.merge.__doc__.strip().startswith("Merge the active adapter")


def test_peft_is_ready_without_an_import_of_modq():
    code = "import peft; print(hasattr(peft.tuners.lora.Linear.merge, '__wrapped__'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "True", done.stderr

"""OPTQ in whole models: architectures, GPTQ checkpoints out and in, and gptqmodel as the witness of both.

gptqmodel lives in an environment of its own, which `python -m benchmarks.peers gptqmodel` makes. It loads
what is written here, and writes what is loaded here, in processes of that environment.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from modq.errors import ModqError, OptionError
from modq.hf import ModqConfig
from modq.hf.config import resolve
from modq.hf.foreign import save_as
from modq.hf.quantizer import ModqHfQuantizer, default_skips
from modq.linear import QuantLinear
from modq.model import Recipe, plan_layers, quantized_layers
from modq.spec import Calibration

pytestmark = pytest.mark.filterwarnings(
    # peft 0.21 asks transformers 5.23 by an old name
    "ignore:`is_gradient_checkpointing` is deprecated",
    # transformers' own words about a config given beside a checkpoint's
    "ignore:You passed `quantization_config`",
)

IDS = torch.arange(4, 20)[None]
PEER = Path(__file__).parents[1] / "benchmarks/.venvs/gptqmodel/bin/python"
with_gptqmodel = pytest.mark.skipif(
    not PEER.is_file(),
    reason="gptqmodel, the witness, has no environment: python -m benchmarks.peers gptqmodel",
)


def quantized(folder: Path, layers: Mapping[str, Any] | None = None, **options: Any) -> Any:
    """Load a dense model and quantize it, each linear by the second moments of random inputs."""
    model = auto(folder).from_pretrained(folder)
    recipe = Recipe("optq", {"group_size": 32, **options}, layers or {})
    generator = torch.Generator().manual_seed(0)
    for name, scheme in plan_layers(model, recipe, default_skips(model, recipe)).items():
        linear = model.get_submodule(name)
        in_features = linear.weight.shape[1 if isinstance(linear, torch.nn.Linear) else 0]  # gpt2's Conv1D
        x = torch.randn(200, in_features, generator=generator)
        calibration = Calibration(hessian=x.T @ x / 200, samples=200)
        model.set_submodule(name, QuantLinear.from_dense(linear, "optq", scheme.options, calibration))
    config = ModqConfig.of(recipe)
    config.resolved = resolve(quantized_layers(model))
    model.hf_quantizer = ModqHfQuantizer(config, pre_quantized=False)
    model.config.quantization_config = config
    model.is_quantized, model.quantization_method = True, config.quant_method
    return model.eval()


def auto(folder: Path) -> Any:
    config = json.loads((folder / "config.json").read_text())
    return AutoModelForSeq2SeqLM if config["model_type"] == "t5" else AutoModelForCausalLM


def taken(folder: Path, **wanted: Any) -> Any:
    return auto(folder).from_pretrained(folder, quantization_config=ModqConfig(takeover=True), **wanted)


def inputs(model: Any) -> dict[str, Tensor]:
    return {"input_ids": IDS, "labels": IDS}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs(model)).logits
    return found


def tensors(model: Any) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": tensor
        for name, layer in quantized_layers(model)
        for key, tensor in layer.quantized_weight.tensors.items()
    }


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert found
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "options", [{"bits": 4}, {"bits": 3, "symmetric": False, "act_order": "full"}], ids=str
)
@pytest.mark.parametrize("architecture", ["llama", "opt", "bloom", "t5", "gpt2"])
def test_models_are_saved_reloaded_and_trained(architecture, options, tiny, tmp_path):
    model = quantized(tiny(architecture), **options)
    model.save_pretrained(tmp_path / "modq")
    again = auto(tiny(architecture)).from_pretrained(tmp_path / "modq")
    assert_same_bits(tensors(again), tensors(model))
    assert torch.equal(logits(again), logits(model))
    trained = get_peft_model(again, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    trained(**inputs(trained)).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in trained.parameters() if p.requires_grad)


@pytest.mark.parametrize("format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(
    ("architecture", "options", "layers"),
    [
        ("llama", {"bits": 3, "symmetric": False, "act_order": "full"}, None),
        ("llama", {"bits": 4}, {"down_proj": {"bits": 8, "group_size": 48}, r"layers\.1.*v_proj": None}),
        ("opt", {"bits": 4, "symmetric": False}, None),
        ("bloom", {"bits": 2, "act_order": "full"}, None),
        ("gpt2", {"bits": 8, "group_size": None}, None),
        ("t5", {"bits": 4}, None),
    ],
)
def test_what_is_written_as_gptq_is_read_back_bit_for_bit(
    architecture, options, layers, format, tiny, tmp_path
):
    model = quantized(tiny(architecture), layers, **options)
    save_as(model, tmp_path / "out", format)
    again = taken(tmp_path / "out")
    assert_same_bits(tensors(again), tensors(model))
    assert torch.equal(logits(again), logits(model))
    given, read = ({name: layer.options for name, layer in quantized_layers(m)} for m in (model, again))
    assert given == read


def test_a_config_that_does_not_fit_the_tensors_is_refused_with_the_layer(tiny_llama, tmp_path):
    save_as(quantized(tiny_llama, bits=4), tmp_path / "out", "gptq")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["bits"] = 3
    path.write_text(json.dumps(config))
    with pytest.raises(
        ModqError, match=r"model\.layers.*: the tensors hold 4 bits .*config and tensors disagree"
    ):
        taken(tmp_path / "out")


def test_scales_in_float32_are_not_written_as_gptq(tiny_llama, tmp_path):
    with pytest.raises(OptionError, match=r"holds no scales of torch\.float32"):
        save_as(quantized(tiny_llama, scale_dtype="float32"), tmp_path / "out", "gptq")


# gptqmodel

LOAD = """
import json, sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPTQConfig
from gptqmodel import BACKEND, GPTQModel
ids = torch.arange(4, 20)[None]
for folder, direct in json.loads(sys.argv[1]):
    config = GPTQConfig(bits=4, backend="gptq_torch")
    try:
        if direct:
            model = GPTQModel.load(folder, backend=BACKEND.TORCH, device="cpu", dtype=torch.float16).model
        else:
            model = AutoModelForCausalLM.from_pretrained(
                folder, quantization_config=config, device_map="cpu", dtype=torch.float32
            )
    except Exception as error:
        print("cannot load", folder, repr(error))
        raise
    found = {name: layer.dequantize_weight().T.contiguous().float() for name, layer in model.named_modules()
             if hasattr(layer, "dequantize_weight")}
    found["logits"] = model(ids).logits.detach().float()
    save_file(found, folder + ("/direct" if direct else "/hf"))
"""

QUANTIZE = """
import json, sys, torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
generator = torch.Generator().manual_seed(0)
for source, folder, config in json.loads(sys.argv[1]):
    model = GPTQModel.load(source, QuantizeConfig(**config), device="cpu", dtype=torch.bfloat16)
    rows = [torch.randint(4, 64, (1, 32), generator=generator) for _ in range(16)]
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
    model.quantize(data, batch_size=1, backend=BACKEND.TORCH)
    model.save(folder)
"""


def run_peer(code: str, folder: Path, *arguments: Any) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "GPTQMODEL_CPU_WORKERS": "2"}
    command = [str(PEER), "-c", code, json.dumps(arguments)]
    # It works in the folder, for it writes logs into the current one.
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.slow  # gptqmodel takes a minute to import and compile
@with_gptqmodel
def test_gptqmodel_loads_what_is_written_here(tiny, tmp_path):
    """By itself, and below transformers; it keeps weights and activations in float16 at best.

    It refuses v1 with zeros of any writer but itself, and transformers knows nothing of `dynamic`.
    """
    kinds: dict[str, tuple[str, dict[str, Any], Any, tuple[bool, ...]]] = {
        "sym": ("gptq", {"bits": 4}, None, (True, False)),
        "sorted-v1": ("gptq", {"bits": 3, "symmetric": False, "act_order": "full"}, None, (False,)),
        "sorted-v2": ("gptq_v2", {"bits": 3, "symmetric": False, "act_order": "full"}, None, (True, False)),
        "rows": ("gptq_v2", {"bits": 2, "group_size": None}, None, (True, False)),
        "dense": ("gptq", {"bits": 8}, {r"layers\.0.*v_proj": None}, (True, False)),
        "mixed": ("gptq_v2", {"bits": 4, "symmetric": False}, {"down_proj": {"bits": 8}}, (True,)),
    }
    models, loads = {}, []
    for name, (format, options, layers, ways) in kinds.items():
        models[name] = quantized(tiny("llama"), layers, **options)
        save_as(models[name], tmp_path / name, format)
        AutoTokenizer.from_pretrained(tiny("llama")).save_pretrained(tmp_path / name)  # it wants one
        loads += [(str(tmp_path / name), direct) for direct in ways]
    run_peer(LOAD, tmp_path, *loads)
    for folder, direct in loads:
        model = models[Path(folder).name]
        found = load_file(f"{folder}/{'direct' if direct else 'hf'}")
        read = found.pop("logits")
        assert relative(read, logits(model)) <= (4e-3 if direct else 1e-3), (folder, direct)
        layers = dict(quantized_layers(model))
        assert found.keys() == layers.keys()
        for name, weight in found.items():
            assert torch.equal(layers[name].dequantize(torch.float16).float(), weight.half().float()), name


@pytest.mark.slow  # gptqmodel takes a minute to import, and some seconds a model
@with_gptqmodel
def test_what_gptqmodel_writes_is_a_base_here(tiny: Callable[..., Path], tmp_path: Path) -> None:
    sorted_v2 = {"bits": 3, "format": "gptq_v2", "sym": False, "desc_act": True, "act_group_aware": False}
    overrides = {"+:.*down_proj.*": {"bits": 8, "group_size": 64}, "-:.*k_proj.*": {}}
    kinds: dict[str, dict[str, Any]] = {
        "default": {"bits": 4},
        "sorted": sorted_v2,
        "dynamic": {"bits": 4, "sym": False, "dynamic": overrides},
    }
    source = str(tiny("llama", torch.bfloat16))
    jobs = [(source, str(tmp_path / name), {"group_size": 32, **kind}) for name, kind in kinds.items()]
    run_peer(QUANTIZE, tmp_path, *jobs)
    in_float32 = [
        folder for _, folder, config in jobs if "dynamic" not in config
    ]  # which transformers does not know
    run_peer(
        LOAD,
        tmp_path,
        *((folder, True) for _, folder, _ in jobs),
        *((folder, False) for folder in in_float32),
    )
    for _, folder, config in jobs:
        model = taken(Path(folder), dtype=torch.float16)
        expected = load_file(f"{folder}/direct")
        # Half precision alone is 1e-3 from float64 here, with a dense model, too.
        exact = logits(taken(Path(folder), dtype=torch.float64))
        assert relative(logits(model), exact) <= 1.1 * relative(expected.pop("logits"), exact), folder
        if folder in in_float32:
            found = logits(taken(Path(folder), dtype=torch.float32))
            assert relative(found, load_file(f"{folder}/hf")["logits"]) <= 1e-3, folder
        layers = dict(quantized_layers(model))
        assert expected.keys() == layers.keys()
        assert {layer.options.bits for layer in layers.values()} >= {config["bits"]}
        for name, weight in expected.items():
            assert torch.equal(layers[name].dequantize(torch.float16).float(), weight), name

"""Two processes train an adapter over one quantized model, by FSDP2 and by DDP; no cast changes a packed bit.

This file is also the program of each process: `python test_fsdp.py RANK FOLDER`.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from modq import ModqConfig, quantize_model
from modq.model import quantized_layers

sys.path.insert(0, str(Path(__file__).parents[1] / "core" / "tests" / "backends"))  # other layouts

pytestmark = [
    # peft 0.21 asks transformers 5.23 by the old name, at every attachment
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

WORLD = 2
IDS = torch.randint(4, 64, (4, 16), generator=torch.Generator().manual_seed(3))
BF16 = torch.bfloat16

Result = dict[str, Any]


def adapted(folder: Path) -> Any:
    """The model with a LoRA that has left its start, where half of the gradients are zero."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=ModqConfig("nf4"), dtype=torch.float32
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        return get_peft_model(model, config)


def dense_twin(model: Any) -> Any:
    """The same with a dense layer of equal weight in the place of each quantized one."""
    twin = copy.deepcopy(model)
    for name, layer in list(quantized_layers(twin)):
        dense = nn.Linear(layer.in_features, layer.out_features, bias=False).requires_grad_(False)
        dense.weight.copy_(layer.dequantize())
        twin.set_submodule(name, dense)
    return twin


def packed(model: nn.Module) -> dict[str, Tensor]:
    """Return the packed tensors whole, gathered from the processes where they are sharded."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {name: tensor.detach().clone() for name, tensor in state.items() if not tensor.is_floating_point()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    named = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for name, g in named.items()}


def step(model: Any, ids: Tensor) -> Result:
    """Train one step; return the gradients, and the packed tensors from after it."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    found = gradients(model)
    optimizer.step()
    return {"gradients": found, "packed": packed(model)}


# In each of the processes


def work(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    mine = IDS.chunk(WORLD)[rank]
    results = {
        "fsdp": step(sharded(adapted(folder / "model")), mine),
        "fsdp_bf16": step(sharded(adapted(folder / "model"), BF16), mine),
        "fsdp_bf16_dense": step(sharded(dense_twin(adapted(folder / "model")), BF16), mine),
        "ddp": step(DistributedDataParallel(adapted(folder / "model")), mine),
    }
    results["local"] = local_shapes(sharded(adapted(folder / "model")))
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


def sharded(model: Any, param_dtype: torch.dtype | None = None) -> Any:
    mesh = dist.init_device_mesh("cpu", (WORLD,))
    policy = MixedPrecisionPolicy(param_dtype=param_dtype)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def local_shapes(model: nn.Module) -> Result:
    """Return how each packed tensor is held here: its dtype, its bytes whole and in this process."""
    return {
        name: (p.dtype, p.numel(), p.to_local().numel())
        for name, p in model.named_parameters()
        if not p.is_floating_point()
    }


# In pytest


@pytest.fixture(scope="module")
def results(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("fsdp")
    (folder / "model").symlink_to(tiny_llama)
    command = [sys.executable, "-W", "ignore", __file__]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(WORLD)
    ]
    try:
        errors = [process.communicate(timeout=400)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * WORLD, "\n".join(errors)[-4000:]
    return torch.load(folder / "results.pt")


@pytest.fixture(scope="module")
def alone(tiny_llama: Path) -> Result:
    """What one process gets for the whole batch."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # as in pytestmark, which a module's fixture is not under
        model = adapted(tiny_llama)
    return {"before": packed(model), **step(model, IDS)}


def distance(a: Result, b: Result) -> float:
    """How far apart all gradients are, relative to `b`."""
    assert a.keys() == b.keys()
    assert all(gradient.norm() > 0 for gradient in a.values())
    flat_a, flat_b = (torch.cat([each[name].flatten() for name in b]).double() for each in (a, b))
    return ((flat_a - flat_b).norm() / flat_b.norm()).item()


@pytest.mark.parametrize("run", ["fsdp", "fsdp_bf16", "ddp"])
def test_every_packed_bit_is_the_same_after_a_step(run, results, alone):
    after = results[run]["packed"]
    assert after.keys() == alone["before"].keys()
    assert len(after) == 14 * 4
    for name, tensor in alone["before"].items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor), name


@pytest.mark.parametrize("run", ["fsdp", "ddp"])
def test_two_processes_get_the_gradient_that_one_gets(run, results, alone):
    # float32, and a sum in two parts: a few roundings
    assert distance(results[run]["gradients"], alone["gradients"]) < 1e-5


def test_mixed_precision_costs_no_more_than_over_dense_layers(results, alone):
    ours, dense = (
        distance(results[run]["gradients"], alone["gradients"]) for run in ("fsdp_bf16", "fsdp_bf16_dense")
    )
    assert 0 < ours <= 2 * dense


def test_the_packed_tensors_are_sharded(results):
    assert results["local"]
    for name, (dtype, whole, local) in results["local"].items():
        assert dtype in (torch.uint8, torch.int32), name
        assert local == whole / WORLD, name


CASTS: dict[str, Callable[[Any], Any]] = {
    "float32": lambda model: model.to(torch.float32),
    "float16": lambda model: model.to(torch.float16),
    "float64": lambda model: model.to(torch.float64),
    "float16, then float32": lambda model: model.to(torch.float16).to(torch.float32),
    "prepared": lambda model: prepare_model_for_kbit_training(model, use_gradient_checkpointing=False),
}
"""Of a bfloat16 model. transformers itself refuses `.half()` and `.float()` on a quantized one."""


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("nf4", {}),
        ("nf4", {"double_quant": False}),
        ("toy-affine", {"zeros": "float", "permuted": True}),
        ("toy-book", {"nested": True}),
        ("toy-bare", {}),
    ],
    ids=str,
)
def test_no_cast_changes_a_packed_bit(cast, backend, options, tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=BF16)
    quantize_model(model, backend, **options)
    before = {name: qweight_bytes(layer) for name, layer in quantized_layers(model)}
    model = cast(model)
    assert model.lm_head.weight.dtype != BF16
    assert len(before) == 14
    for name, layer in quantized_layers(model):
        for key, tensor in qweight_bytes(layer).items():
            assert torch.equal(tensor, before[name][key]), f"{name}.{key}"


def qweight_bytes(layer: Any) -> dict[str, Tensor]:
    tensors = layer.quantized_weight.tensors
    return {name: tensor.contiguous().view(torch.uint8).clone() for name, tensor in tensors.items()}


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))

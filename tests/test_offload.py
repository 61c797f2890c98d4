"""Adapters train over a base that is offloaded, or spread over devices, as over one held in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import modeling
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments

from modq import ModqConfig
from modq.model import quantized_layers

IDS = torch.arange(4, 20).view(2, 8)
STAGES = {
    "model.embed_tokens": "cpu:0",
    "model.rotary_emb": "cpu:0",
    "model.layers.0": "cpu:0",
    "model.layers.1": "cpu:1",
    "model.norm": "cpu:1",
    "lm_head": "cpu:1",
}
"""Two stages. To accelerate "cpu:1" is another device than "cpu:0", so it hooks and moves what goes from one
to the other; to torch both are main memory."""

ON_DISK = {**dict.fromkeys(STAGES, "cpu"), "model.layers.1": "disk", "lm_head": "disk"}
MOSTLY_ON_DISK = {**dict.fromkeys(STAGES, "disk"), "model.layers.0": "cpu"}

Curve = list[float]


def load(folder: Path, **given: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=ModqConfig("nf4"), dtype=torch.float32, **given
    )


def in_memory(folder: Path, _: Path) -> PreTrainedModel:
    return load(folder)


def quantized_onto_disk(folder: Path, offload: Path) -> PreTrainedModel:
    return load(folder, device_map=ON_DISK, offload_folder=offload)


def reloaded_from_disk(folder: Path, offload: Path) -> PreTrainedModel:
    load(folder).save_pretrained(offload / "packed")
    return AutoModelForCausalLM.from_pretrained(
        offload / "packed", device_map=MOSTLY_ON_DISK, offload_folder=offload / "weights"
    )


def offloaded_to_cpu(folder: Path, _: Path) -> PreTrainedModel:
    model = cpu_offload(load(folder), execution_device=torch.device("cpu"))
    return told_trainer(model)


def offloaded_to_disk(folder: Path, offload: Path) -> PreTrainedModel:
    model = load(folder)
    disk_offload(model, str(offload), execution_device=torch.device("cpu"))
    return told_trainer(model)


def told_trainer(model: PreTrainedModel) -> PreTrainedModel:
    """Give the model a device map: Trainer moves one that has none, though it is on meta; dense ones too."""
    model.hf_device_map = {"model": "cpu", "lm_head": "cpu"}
    return model


def in_two_stages(folder: Path, _: Path) -> PreTrainedModel:
    return load(folder, device_map=STAGES)


def dispatched_in_two_stages(folder: Path, _: Path) -> PreTrainedModel:
    return dispatch_model(load(folder), STAGES, force_hooks=True)


Placed = Callable[[Path, Path], PreTrainedModel]
OFFLOADED = [quantized_onto_disk, reloaded_from_disk, offloaded_to_cpu, offloaded_to_disk]
STAGED = [in_two_stages, dispatched_in_two_stages]


def with_adapters(model: PreTrainedModel) -> PeftModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
        return get_peft_model(model, config)


def train(model: PeftModel, folder: Path, texts: list[str], output: Path) -> tuple[Curve, dict[str, Tensor]]:
    """Return the losses of eight steps of Trainer, and the adapter after them."""
    ids = AutoTokenizer.from_pretrained(folder)(texts)["input_ids"]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(output),
            max_steps=8,
            learning_rate=2e-2,
            per_device_train_batch_size=4,
            logging_steps=1,
            save_strategy="no",
            seed=0,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def hooks(model: nn.Module) -> list[AlignDevicesHook]:
    found = (getattr(module, "_hf_hook", None) for module in model.modules())
    return [hook for hook in found if isinstance(hook, AlignDevicesHook)]


def resting(model: nn.Module) -> int:
    """How many quantized layers hold nothing between their forwards."""
    return sum(
        all(tensor.is_meta for _, tensor in layer.named_packed()) for _, layer in quantized_layers(model)
    )


@pytest.fixture(autouse=True)
def _numbered_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let accelerate see that what is on "cpu" is on "cpu:1" too.

    It would move a parameter anew at each hook, and with no such device to show, leave a plain tensor in its
    place: of a dense model's layers too.
    """
    same = modeling.check_device_same
    monkeypatch.setattr(modeling, "check_device_same", lambda a, b: a.type == b.type == "cpu" or same(a, b))


@pytest.fixture(scope="module")
def alone(
    tiny_llama: Path, texts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Curve, dict[str, Tensor]]:
    return train(with_adapters(load(tiny_llama)), tiny_llama, texts, tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("placed", [*OFFLOADED, *STAGED], ids=lambda placed: placed.__name__)
def test_training_follows_the_model_in_memory_step_by_step(
    placed: Placed, tiny_llama: Path, texts: list[str], alone: Any, tmp_path: Path
) -> None:
    model = with_adapters(placed(tiny_llama, tmp_path))
    assert hooks(model)
    offloaded = resting(model)
    assert (offloaded > 0) == (placed in OFFLOADED)
    losses, adapter = train(model, tiny_llama, texts, tmp_path / "run")
    assert resting(model) == offloaded
    assert losses == pytest.approx(alone[0], rel=0, abs=1e-5)
    assert losses[-1] < 0.9 * losses[0]
    assert adapter.keys() == alone[1].keys()
    for name, tensor in adapter.items():
        # in memory LoRA is one node, under accelerate's hooks PEFT's own products: sums in another order
        torch.testing.assert_close(tensor, alone[1][name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("placed", [*OFFLOADED, *STAGED], ids=lambda placed: placed.__name__)
def test_a_merge_is_that_of_the_model_in_memory(placed: Placed, tiny_llama: Path, tmp_path: Path) -> None:
    @torch.no_grad()
    def merged(model: PreTrainedModel) -> Tensor:
        return with_adapters(model).merge_and_unload()(input_ids=IDS).logits

    model = placed(tiny_llama, tmp_path)
    with torch.no_grad():
        plain = model(input_ids=IDS).logits
    found = merged(model)
    assert torch.equal(found, merged(load(tiny_llama)))
    assert not torch.allclose(found, plain, atol=0.1)

"""Trainer in several processes, as `torchrun` and `accelerate launch` start them, follows one process.

This file is also the program of each process: `torchrun ... test_processes.py FOLDER NAME BATCH_SIZE`.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import DistributedType, PartialState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from modq import ModqConfig
from modq.model import quantized_layers

WORLD = 2
STEPS, SAVED = 8, 4
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "ACCELERATE_USE_CPU": "true",
}
"""What `accelerate launch --config_file` of an FSDP2 config sets."""

Result = dict[str, Any]


# In each of the processes


def work(folder: Path, name: str, batch_size: int) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(
        folder / "model", quantization_config=ModqConfig("nf4"), dtype=torch.float32
    )
    # The adapter has left its start, where half of the gradients are zero
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    before = {n: tensor.clone() for n, tensor in packed(model).items()}
    args = arguments(folder / name, batch_size)
    if "ACCELERATE_USE_FSDP" in os.environ:
        # accelerate 1.15 heeds these variables only where it sees accelerators; what follows runs on CPUs
        PartialState().distributed_type = DistributedType.MULTI_GPU
    resume = "RESUME" in os.environ
    trainer = Trainer(model=model, args=args, train_dataset=rows(folder / "model"))
    trainer.add_callback(Killed())
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(folder / name / "adapter"))
    wrapped = trainer.model_wrapped
    held = {n: (type(p).__name__, p.numel(), local(p).numel()) for n, p in packed(wrapped).items()}
    whole = get_model_state_dict(wrapped, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if trainer.accelerator.is_main_process:
        result = {
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "processes": trainer.accelerator.num_processes,
            "kind": str(trainer.accelerator.distributed_type),
            "held": held,
            "before": before,
            "packed": {bare(n): t for n, t in whole.items() if bare(n) in before},
            "adapter": {bare(n): t for n, t in whole.items() if "lora_" in n},
        }
        torch.save(result, folder / f"{name}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Killed(TrainerCallback):
    """Kills the last process in a step after the checkpoint, where that is asked for."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if "KILL" in os.environ and state.global_step == SAVED + 2 and args.process_index == WORLD - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def arguments(output: Path, batch_size: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(output), max_steps=STEPS, learning_rate=1e-2, per_device_train_batch_size=batch_size,
        logging_steps=1, save_strategy="steps", save_steps=SAVED, seed=0, use_cpu=True, report_to=[],
        disable_tqdm=True, dataloader_pin_memory=False,
        ddp_backend="gloo" if "LOCAL_RANK" in os.environ else None,
    )  # fmt: skip


def rows(model: Path) -> Dataset:
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer((model.parent / "texts.txt").read_text().splitlines())["input_ids"]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def packed(model: nn.Module) -> dict[str, Any]:
    return {
        bare(f"{layer_name}.{name}"): tensor
        for layer_name, layer in quantized_layers(model)
        for name, tensor in layer.named_packed()
    }


def bare(name: str) -> str:
    return name.removeprefix("module.")


def local(tensor: Any) -> Any:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


# In pytest


@pytest.fixture(scope="module")
def folder(tiny_llama: Path, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    (folder / "model").symlink_to(tiny_llama)
    # 16 rows, so that every batch is full and both processes see as many
    (folder / "texts.txt").write_text("\n".join([*texts, texts[0]]))
    return folder


def launch(folder: Path, name: str, command: list[str], batch_size: int, **variables: str) -> Result:
    """Run this file by `python -W ignore -m COMMAND`; return what its first process found."""
    done = run_once(folder, name, command, batch_size, **variables)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / f"{name}.pt", weights_only=True)


def run_once(
    folder: Path, name: str, command: list[str], batch_size: int, **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | variables
    return subprocess.run(
        [sys.executable, "-W", "ignore", *command, __file__, str(folder), name, str(batch_size)],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def torchrun() -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return ["-m", "torch.distributed.run", "--nproc_per_node", str(WORLD), "--master_port", str(port)]


@pytest.fixture(scope="module")
def alone(folder: Path) -> Result:
    return launch(folder, "alone", [], 4)


@pytest.fixture(scope="module")
def ddp(folder: Path) -> Result:
    return launch(folder, "ddp", torchrun(), 2)


@pytest.fixture(scope="module")
def fsdp2(folder: Path) -> Result:
    return launch(folder, "fsdp2", torchrun(), 2, **FSDP2)


@pytest.fixture(scope="module")
def launched(folder: Path) -> Result:
    command = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    return launch(folder, "launched", command, 4)


RUNS = {"ddp": (WORLD, "MULTI_CPU"), "fsdp2": (WORLD, "FSDP"), "launched": (1, "NO")}


@pytest.mark.parametrize("run", RUNS)
def test_every_step_has_the_loss_that_one_process_has(run, alone, request):
    result = request.getfixturevalue(run)
    processes, kind = RUNS[run]
    assert (result["processes"], result["kind"].removeprefix("DistributedType.")) == (processes, kind)
    assert len(alone["losses"]) == STEPS
    assert alone["losses"][-1] < 0.9 * alone["losses"][0]
    assert result["losses"] == pytest.approx(alone["losses"], rel=0, abs=1e-5)


@pytest.mark.parametrize("run", RUNS)
def test_the_adapter_ends_where_that_of_one_process_does(run, alone, request):
    adapter = request.getfixturevalue(run)["adapter"]
    assert adapter.keys() == alone["adapter"].keys()
    for name, tensor in alone["adapter"].items():
        torch.testing.assert_close(adapter[name], tensor, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("run", ["alone", *RUNS])
def test_training_changes_no_packed_bit(run, alone, request):
    result = request.getfixturevalue(run)
    assert len(alone["before"]) == 14 * 4
    assert result["packed"].keys() == alone["before"].keys()
    for name, tensor in alone["before"].items():
        assert torch.equal(result["packed"][name], tensor), name


def test_fsdp2_shards_every_packed_tensor_and_ddp_none(fsdp2, ddp, alone):
    assert fsdp2["held"].keys() == ddp["held"].keys() == alone["before"].keys()
    for name, (kind, whole, mine) in fsdp2["held"].items():
        assert (kind, mine) == ("DTensor", whole / WORLD), name
    assert {(kind, whole == mine) for kind, whole, mine in ddp["held"].values()} == {("Parameter", True)}


@pytest.mark.parametrize("run", RUNS)
def test_the_saved_adapter_is_the_trained_one(run, folder, request):
    result = request.getfixturevalue(run)
    saved = load_file(folder / run / "adapter" / "adapter_model.safetensors")
    trained = {name.replace(".default", ""): tensor for name, tensor in result["adapter"].items()}
    assert saved.keys() == trained.keys()
    for name, tensor in saved.items():
        assert torch.equal(tensor, trained[name]), name


@pytest.mark.parametrize(("run", "variables"), [("ddp", {}), ("fsdp2", FSDP2)], ids=["ddp", "fsdp2"])
def test_a_run_whose_worker_was_killed_resumes_to_every_bit(run, variables, folder, request):
    through, name = request.getfixturevalue(run), f"{run}-killed"
    killed = run_once(folder, name, torchrun(), 2, KILL="1", **variables)
    assert killed.returncode != 0
    assert "SIGKILL" in killed.stderr
    assert [path.name for path in (folder / name).glob("checkpoint-*")] == [f"checkpoint-{SAVED}"]
    resumed = launch(folder, name, torchrun(), 2, RESUME="1", **variables)
    assert resumed["losses"] == through["losses"]
    assert resumed["adapter"].keys() == through["adapter"].keys()
    for tensor_name, tensor in through["adapter"].items():
        assert torch.equal(resumed["adapter"][tensor_name], tensor), tensor_name


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))

"""A run that was killed and resumed ends bit for bit where an uninterrupted one does; evaluating, saving and
the odd parts of models and optimizers change nothing either.

This file is also the program that is killed: `python test_resume.py KIND FOLDER OUTPUT`.
"""

from __future__ import annotations

import copy
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from modq import ModqConfig
from modq.errors import CheckpointError
from modq.linear import QuantLinear
from modq.model import quantized_layers

IDS = torch.arange(4, 20).view(2, 8)
STEPS, SAVED = 8, 4

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": 0.1}


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=ModqConfig("nf4"), dtype=torch.float32
    )


def with_adapters(model: Any, **given: Any) -> PeftModel:
    """Attach LoRA that has left its start, where half of the gradients are zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoraConfig(**{"r": 4, "target_modules": "all-linear", **given}, init_lora_weights=False)
        return get_peft_model(model, config)


def arguments(output: Path, **given: Any) -> dict[str, Any]:
    return {
        "output_dir": str(output),
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 0,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **given,
    }


def losses(history: list[dict[str, Any]]) -> list[float]:
    return [entry["loss"] for entry in history if "loss" in entry]


# The program that is killed


def make_trainer(kind: str, folder: Path, output: Path, callbacks: Any = ()) -> Trainer:
    """Make a trainer with dropout, whose random state a resumed run must restore too."""
    texts = (folder / "texts.txt").read_text().splitlines()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    given = arguments(output, save_strategy="steps", save_steps=SAVED, lr_scheduler_type="cosine")
    lora = LoraConfig(**LORA, task_type="CAUSAL_LM")
    if kind == "SFTTrainer":
        return SFTTrainer(
            model=load(folder / "model"),
            args=SFTConfig(**given),
            peft_config=lora,
            train_dataset=Dataset.from_dict({"text": texts}),
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )
    torch.manual_seed(0)
    ids = tokenizer(texts)["input_ids"]
    return Trainer(
        model=get_peft_model(load(folder / "model"), lora),
        args=TrainingArguments(**given),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        callbacks=list(callbacks),
    )


class Wait(TrainerCallback):
    """Waits to be killed in a step after the checkpoint."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step > SAVED + 1:
            Path(args.output_dir, "beyond").touch()
            time.sleep(600)


# Killed and resumed


def run_until_killed(kind: str, folder: Path, output: Path) -> None:
    """Start a run in a process of its own and kill it when it is beyond its first checkpoint."""
    command = [sys.executable, "-W", "ignore", __file__, kind, str(folder), str(output)]
    errors = output.with_suffix(".log")
    with errors.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 200
            while not (output / "beyond").exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL, errors.read_text()[-4000:]
        finally:
            process.kill()


def final(output: Path) -> dict[str, Any]:
    """Return what the last checkpoint holds: adapter, optimizer, schedule and losses."""
    folder = output / f"checkpoint-{STEPS}"
    state = json.loads((folder / "trainer_state.json").read_text())
    optimizer = torch.load(folder / "optimizer.pt", weights_only=True)
    moments = {f"{i}.{n}": t for i, each in optimizer["state"].items() for n, t in each.items()}
    return {
        "adapter": load_file(folder / "adapter_model.safetensors"),
        "moments": moments,
        "groups": optimizer["param_groups"],
        "schedule": torch.load(folder / "scheduler.pt", weights_only=True),
        "history": [
            {key: entry[key] for key in ("step", "loss", "grad_norm", "learning_rate")}
            for entry in state["log_history"]
            if "loss" in entry
        ],
    }


@pytest.mark.parametrize("kind", ["Trainer", "SFTTrainer"])
def test_a_killed_run_resumes_to_every_bit_of_the_uninterrupted_one(
    kind: str, tiny_llama: Path, texts: list[str], tmp_path: Path
) -> None:
    (tmp_path / "model").symlink_to(tiny_llama)
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    run_until_killed(kind, tmp_path, tmp_path / "killed")
    assert not (tmp_path / "killed" / f"checkpoint-{STEPS}").exists()
    make_trainer(kind, tmp_path, tmp_path / "through").train()
    resumed = make_trainer(kind, tmp_path, tmp_path / "killed")
    resumed.train(resume_from_checkpoint=True)

    expected, found = final(tmp_path / "through"), final(tmp_path / "killed")
    assert len(expected["history"]) == STEPS
    assert len({entry["loss"] for entry in expected["history"]}) == STEPS
    for what in ("groups", "schedule", "history"):
        assert found[what] == expected[what], what
    for what in ("adapter", "moments"):
        assert expected[what].keys() == found[what].keys()
        assert expected[what]
        for name, tensor in expected[what].items():
            assert torch.equal(found[what][name], tensor), name


# Evaluated and saved in between


def dense_twin(model: PeftModel) -> PeftModel:
    """Copy a model, with a dense layer of equal weight in the place of each quantized one."""
    twin = copy.deepcopy(model)
    for name, layer in list(quantized_layers(twin)):
        dense = nn.Linear(layer.in_features, layer.out_features, bias=False).requires_grad_(False)
        dense.weight.copy_(layer.dequantize())
        twin.set_submodule(name, dense)
    return twin


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return every adapter's gradient for one batch; none is zero."""
    model.train().zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, gradient in found.items() if not gradient.any()] == []
    return found


def packed(model: nn.Module) -> dict[str, Tensor]:
    layers = quantized_layers(model)
    return {f"{at}.{name}": t.detach().clone() for at, layer in layers for name, t in layer.named_packed()}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def base_checkpoint(model: PeftModel, folder: Path) -> Path:
    """Save the base under an adapter, as `unload` gives it."""
    copy.deepcopy(model).unload().save_pretrained(folder)
    return folder


def test_training_after_an_eval_forward_and_saving_is_right_at_each_step(
    tiny_llama: Path, tmp_path: Path
) -> None:
    model = with_adapters(load(tiny_llama))
    before = packed(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for step in range(4):
        found, expected = gradients(model), gradients(dense_twin(model))
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, msg=lambda text, name=name: f"{name}: {text}")
        optimizer.step()
        shown = logits(model)
        torch.testing.assert_close(shown, logits(dense_twin(model)))
        assert all(torch.equal(tensor, before[name]) for name, tensor in packed(model).items()), step
        model.save_pretrained(tmp_path / f"adapter-{step}")
        base = base_checkpoint(model, tmp_path / f"base-{step}")
        again = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        again = PeftModel.from_pretrained(again, tmp_path / f"adapter-{step}")
        assert torch.equal(logits(again), shown)


def theirs(folder: Path) -> PeftModel:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return with_adapters(
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    )


def test_bitsandbytes_goes_wrong_after_an_eval_forward_on_avx512_bf16(tiny_llama: Path) -> None:
    """bitsandbytes 0.50.2 packs its weights anew in an eval forward there, and its backward does not know."""
    if not pytest.importorskip("bitsandbytes").functional.has_avx512bf16():
        pytest.skip("bitsandbytes repacks its weights only on a CPU with AVX512-BF16, which this one lacks")
    model = theirs(tiny_llama)
    before = gradients(model)
    logits(model)
    model.train().zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    after = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert any(not torch.allclose(after[name], gradient, rtol=0.1) for name, gradient in before.items())


def test_bitsandbytes_goes_through_the_same_on_other_cpus(tiny_llama: Path, tmp_path: Path) -> None:
    """bitsandbytes 0.50.2 keeps gradients and weights right where it has no kernel to repack for."""
    if pytest.importorskip("bitsandbytes").functional.has_avx512bf16():
        pytest.skip("bitsandbytes repacks its weights on this CPU, which has AVX512-BF16: see the test above")
    model = theirs(tiny_llama)
    before = gradients(model)
    logits(model)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, before[name], msg=name)
    shown = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(
        base_checkpoint(model, tmp_path / "base"), dtype=torch.float32
    )
    assert torch.equal(logits(PeftModel.from_pretrained(again, tmp_path / "adapter")), shown)


# Odd parts of models


@pytest.mark.parametrize("saved", ["down_proj", "mlp"])
def test_modules_to_save_trains_a_quantized_layer_densely_and_saves_it(
    saved: str, tiny_llama: Path, tmp_path: Path
) -> None:
    base = load(tiny_llama)
    plain = logits(base)
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=[saved])
    model = get_peft_model(base, config)
    torch.testing.assert_close(logits(model), plain)  # a dense copy's sums are taken in another order
    whole = {name: p for name, p in model.named_parameters() if "modules_to_save" in name}
    assert {p.dtype for p in whole.values()} == {torch.float32}
    start = {name: p.detach().clone() for name, p in whole.items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(2):
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert whole
    assert not any(torch.equal(p, start[name]) for name, p in whole.items())
    trained = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(load(tiny_llama), tmp_path / "adapter")), trained)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)

    merged = model.merge_and_unload()
    assert type(merged.model.layers[0].mlp.down_proj) is nn.Linear
    assert isinstance(merged.model.layers[0].self_attn.k_proj, QuantLinear)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert torch.equal(logits(again), logits(merged))


def test_modules_to_save_on_an_offloaded_layer_is_one_clear_line(tiny_llama: Path, tmp_path: Path) -> None:
    places = dict.fromkeys(["embed_tokens", "rotary_emb", "layers.0", "norm"], "cpu") | {"layers.1": "disk"}
    model = AutoModelForCausalLM.from_pretrained(
        tiny_llama,
        quantization_config=ModqConfig("nf4"),
        device_map={"lm_head": "cpu"} | {f"model.{name}": place for name, place in places.items()},
        offload_folder=tmp_path,
    )
    with pytest.raises(CheckpointError, match=r"^modules_to_save names a QuantLinear that is offloaded.*$"):
        get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["down_proj"]))


@pytest.mark.parametrize("architecture", ["llama", "gemma"])
def test_a_quantized_model_takes_more_tokens_and_reloads(
    architecture: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    model = load(tiny(architecture))
    before = packed(model)
    plain = logits(model)
    model.resize_token_embeddings(70)
    tied = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert tied == (architecture == "gemma")
    assert logits(model).shape == (*IDS.shape, 70)
    torch.testing.assert_close(logits(model)[..., :64], plain)
    assert all(torch.equal(tensor, before[name]) for name, tensor in packed(model).items())
    gradients(with_adapters(copy.deepcopy(model)))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))


OWN_CLASS = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 2
        return out
"""


def test_a_model_whose_class_comes_with_the_checkpoint_quantizes_trains_saves_and_reloads(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))  # transformers adds that folder
    folder = tmp_path / "own"
    shutil.copytree(tiny_llama, folder)
    (folder / "modeling_own.py").write_text(OWN_CLASS)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"]}
    classes = {"AutoConfig": "OwnConfig", "AutoModelForCausalLM": "OwnForCausalLM"}
    config["auto_map"] = {auto: f"modeling_own.{name}" for auto, name in classes.items()}
    (folder / "config.json").write_text(json.dumps(config))

    given = {"trust_remote_code": True, "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=ModqConfig("nf4"), **given)
    assert type(model).__name__ == "OwnForCausalLM"
    assert torch.equal(logits(model), 2 * logits(load(tiny_llama)))
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", **given)
    assert type(again).__name__ == "OwnForCausalLM"
    assert len(list(quantized_layers(again))) == 14
    assert torch.equal(logits(again), logits(model))
    gradients(with_adapters(again))


# Optimizers by name


def train_with(optim: str, model: PeftModel, texts: list[str], output: Path) -> Trainer:
    words = sorted({word for text in texts for word in text.split()})
    ids = [[4 + words.index(word) for word in text.split()] for text in texts]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments(output, optim=optim)),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
    )
    trainer.train()
    return trainer


# It falls back, and says so: that it pages was not tested, for which it needs a GPU
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
@pytest.mark.parametrize(
    "optim", ["adamw_torch", "adafactor", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit"]
)
def test_an_optimizer_by_name_trains_as_over_dense_weights(
    optim: str, tiny_llama: Path, texts: list[str], tmp_path: Path
) -> None:
    if "bit" in optim:
        pytest.importorskip("bitsandbytes")
    model = with_adapters(load(tiny_llama), r=64)  # of less than 4096 elements bitsandbytes keeps 32 bits
    before = packed(model)
    dense = train_with(optim, dense_twin(model), texts, tmp_path / "dense")
    trainer = train_with(optim, model, texts, tmp_path / "quantized")
    found, expected = (losses(each.state.log_history) for each in (trainer, dense))
    assert found == pytest.approx(expected, rel=0, abs=1e-5)
    assert found[-1] < 0.95 * found[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in packed(model).items())
    dtypes = {state["state1"].dtype for state in trainer.optimizer.state.values() if "state1" in state}
    assert (torch.uint8 in dtypes) == optim.endswith("8bit")


if __name__ == "__main__":
    make_trainer(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), [Wait()]).train()

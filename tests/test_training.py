"""Training through the users' own trainers: the QLoRA scripts that exist, with another config object."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

import modq
from modq.hf.peft import fuse_lora
from modq.model import quantized_layers

# What changes in a script: this line, for
#     BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
QUANTIZATION = modq.ModqConfig("nf4", quant_type="nf4", double_quant=True)

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear"}


def packed_bits(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every packed tensor, by the name that it has without adapters."""
    return {
        f"{layer_name}.{name}".removeprefix("base_model.model.").replace(".base_layer", ""): tensor.clone()
        for layer_name, layer in quantized_layers(model)
        for name, tensor in layer.named_packed()
    }


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def adapter_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return every adapter tensor's gradient; it is there, and not zero."""
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert gradients
    assert [name for name, gradient in gradients.items() if not gradient.any()] == []
    return gradients


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare to the rounding of the dtype, naming the tensor that differs."""
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def assert_training_left_the_base_alone(model: nn.Module, before: dict[str, Tensor]) -> None:
    assert_same(before, packed_bits(model))
    packed = [tensor for _, layer in quantized_layers(model) for _, tensor in layer.named_packed()]
    assert all(tensor.grad is None and not tensor.requires_grad for tensor in packed)


def assert_learned(trainer: Trainer) -> None:
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) / 3 < 0.9 * losses[0], losses


def inputs(model: nn.Module) -> dict[str, Tensor]:
    ids = torch.arange(4, 20).view(2, 8)
    return {
        "input_ids": ids,
        **({"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {}),
    }


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(**inputs(model)).logits


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=QUANTIZATION)


def with_adapters(model: PreTrainedModel) -> PeftModel:
    """Attach LoRA whose B is not zero, so that its A has a gradient from the first step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_peft_model(model, LoraConfig(**LORA, init_lora_weights=False))


def arguments(folder: Path, **given: Any) -> dict[str, Any]:
    """Arguments that all trainers share: few steps that log each loss, on the CPU."""
    return {
        "output_dir": str(folder),
        "max_steps": 8,
        "learning_rate": 2e-2,
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


@pytest.fixture
def text(texts: list[str]) -> Dataset:
    return Dataset.from_dict({"text": texts})


@pytest.fixture
def tokens(tiny_llama: Path, texts: list[str]) -> Dataset:
    """The texts as plain Trainer takes them."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    rows = [{"input_ids": ids, "labels": ids} for ids in tokenizer(texts)["input_ids"]]
    return Dataset.from_list(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_qlora_script_for_a_decoder_runs_with_another_config_object(
    tiny: Callable[..., Path], text: Dataset, tmp_path: Path, dtype: torch.dtype
) -> None:
    model_id = tiny("llama", dtype)
    model = AutoModelForCausalLM.from_pretrained(model_id, quantization_config=QUANTIZATION, dtype=dtype)
    before = packed_bits(model)
    model = prepare_model_for_kbit_training(model)
    model = get_peft_model(model, LoraConfig(**LORA, task_type="CAUSAL_LM"))
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**arguments(tmp_path / "run", bf16=dtype == torch.bfloat16)),
        train_dataset=text,
        processing_class=AutoTokenizer.from_pretrained(model_id),
    )
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    assert_learned(trainer)
    assert_training_left_the_base_alone(model, before)

    base = AutoModelForCausalLM.from_pretrained(model_id, quantization_config=QUANTIZATION, dtype=dtype)
    base = prepare_model_for_kbit_training(base)  # it widens norms, embeddings and head to float32
    untrained = logits(base)
    again = PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.autocast(
        "cpu", torch.bfloat16, enabled=dtype == torch.bfloat16
    ):  # as the trainer left `model`
        assert torch.equal(logits(model).float(), logits(again).float())
        assert not torch.equal(logits(again).float(), untrained.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_qlora_script_for_t5_runs_with_another_config_object(
    tiny: Callable[..., Path], texts: list[str], tmp_path: Path, dtype: torch.dtype
) -> None:
    model_id = tiny("t5", dtype)
    tokenizer = AutoTokenizer.from_pretrained(model_id)
    model = AutoModelForSeq2SeqLM.from_pretrained(model_id, quantization_config=QUANTIZATION, dtype=dtype)
    before = packed_bits(model)
    model = prepare_model_for_kbit_training(model)
    model = get_peft_model(
        model, LoraConfig(**{**LORA, "target_modules": ["q", "v"]}, task_type="SEQ_2_SEQ_LM")
    )
    rows = tokenizer(texts, text_target=[line.split()[0] for line in texts])
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            **arguments(tmp_path / "run", learning_rate=0.1, max_steps=12, predict_with_generate=True)
        ),
        train_dataset=Dataset.from_dict(dict(rows)),
        eval_dataset=Dataset.from_dict({name: column[:4] for name, column in rows.items()}),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        processing_class=tokenizer,
    )
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.9 * trainer.state.log_history[0]["loss"]
    trainer.save_model(tmp_path / "adapter")
    assert_learned(trainer)
    assert_training_left_the_base_alone(model, before)

    base = AutoModelForSeq2SeqLM.from_pretrained(model_id, quantization_config=QUANTIZATION, dtype=dtype)
    again = PeftModel.from_pretrained(prepare_model_for_kbit_training(base), tmp_path / "adapter")
    assert torch.equal(logits(model), logits(again))


@pytest.mark.parametrize("how", ["a quantized model", "a path and quantization_config", "model_init_kwargs"])
def test_sft_trainer_attaches_the_adapters_itself(
    tiny_llama: Path, text: Dataset, tmp_path: Path, how: str
) -> None:
    in_args = (
        {"model_init_kwargs": {"quantization_config": QUANTIZATION}} if how == "model_init_kwargs" else {}
    )
    trainer = SFTTrainer(
        model=load(tiny_llama) if how == "a quantized model" else str(tiny_llama),
        args=SFTConfig(**arguments(tmp_path, **in_args)),
        train_dataset=text,
        processing_class=AutoTokenizer.from_pretrained(tiny_llama),
        peft_config=LoraConfig(**LORA, task_type="CAUSAL_LM"),
        **({"quantization_config": QUANTIZATION} if how == "a path and quantization_config" else {}),
    )
    before = packed_bits(trainer.model)
    trainer.train()
    assert_learned(trainer)
    assert_training_left_the_base_alone(trainer.model, before)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5"])
def test_gradient_checkpointing_needs_the_argument_alone_and_changes_no_gradient(
    tiny: Callable[..., Path], tokens: Dataset, tmp_path: Path, architecture: str, use_reentrant: bool
) -> None:
    def gradients(**checkpointing: Any) -> tuple[dict[str, Tensor], int]:
        auto = AutoModelForSeq2SeqLM if architecture == "t5" else AutoModelForCausalLM
        folder = tiny(architecture)
        model = with_adapters(auto.from_pretrained(folder, quantization_config=QUANTIZATION))
        forwards: list[Any] = []
        _, layer = next(quantized_layers(model))
        layer.register_forward_hook(lambda *_: forwards.append(None))
        seen = _Gradients()
        Trainer(
            model=model,
            args=TrainingArguments(**arguments(tmp_path, max_steps=1, **checkpointing)),
            train_dataset=tokens,
            callbacks=[seen],
        ).train()
        return seen.gradients, len(forwards)

    expected, once = gradients()
    found, twice = gradients(
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
    )
    assert (once, twice) == (1, 2)  # checkpointing was at work
    assert_close(found, expected)  # T5 sums its gradients in another order


class _Gradients(TrainerCallback):
    """Keeps the adapters' gradients of the last step."""

    def on_pre_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
        self.gradients = adapter_gradients(model)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma", "opt", "bloom", "gpt2", "t5"])
def test_every_adapter_trains_as_on_the_dense_weights(tiny: Callable[..., Path], architecture: str) -> None:
    def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
        adapted = with_adapters(model).double()
        adapted(**inputs(adapted)).logits.square().mean().backward()
        return adapter_gradients(adapted)

    auto = AutoModelForSeq2SeqLM if architecture == "t5" else AutoModelForCausalLM
    quantized, dense = (
        auto.from_pretrained(tiny(architecture), quantization_config=QUANTIZATION, dtype=torch.float64)
        for _ in range(2)
    )
    found = gradients(quantized)
    with warnings.catch_warnings():  # of PEFT, that a Conv1D wants fan_in_fan_out, which it then sets
        warnings.simplefilter("ignore", UserWarning)
        expected = gradients(dense.dequantize())
    assert_close(found, expected)


def test_preparing_and_dtype_moves_keep_every_packed_bit(tiny: Callable[..., Path]) -> None:
    model = load(tiny("llama", torch.bfloat16), torch.bfloat16)
    before = packed_bits(model)
    assert_same(before, packed_bits(prepare_model_for_kbit_training(model)))
    assert model.model.norm.weight.dtype == torch.float32  # it did prepare
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert_same(before, packed_bits(model.to(dtype)))
        assert logits(model).dtype == dtype


@pytest.mark.parametrize("wanted", [True, False])
def test_kbit_preparation_switches_checkpointing_on_as_for_other_quantizations(
    tiny_llama: Path, wanted: bool
) -> None:
    prepared = prepare_model_for_kbit_training(load(tiny_llama), use_gradient_checkpointing=wanted)
    assert prepared.model.gradient_checkpointing is wanted
    trained = get_peft_model(prepared, LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear"))
    trained.train()(input_ids=torch.arange(4, 20)[None], labels=torch.arange(4, 20)[None]).loss.backward()
    adapter_gradients(trained)


def test_bf16_training_computes_in_bf16_and_keeps_adapters_in_float32(
    tiny_llama: Path, tokens: Dataset, tmp_path: Path
) -> None:
    model = with_adapters(load(tiny_llama))
    dtypes: set[torch.dtype] = set()
    for _, layer in quantized_layers(model):
        layer.register_forward_hook(lambda _module, _x, y: dtypes.add(y.dtype))
    args = TrainingArguments(**arguments(tmp_path, bf16=True))
    trainer = Trainer(model=model, args=args, train_dataset=tokens)
    trainer.train()
    assert dtypes == {torch.bfloat16}
    assert {tensor.dtype for tensor in adapter_tensors(model).values()} == {torch.float32}
    assert_learned(trainer)


def test_a_model_partly_on_disk_trains_as_in_memory(
    tiny_llama: Path, tokens: Dataset, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    # Under accelerate's hooks LoRA is PEFT's own products, whose sums differ from those of one node by
    # roundings, which the optimizer magnifies.
    fuse_lora(False)
    request.addfinalizer(fuse_lora)

    def train(**given: Any) -> dict[str, Tensor]:
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=QUANTIZATION, **given)
        model = with_adapters(model)
        args = TrainingArguments(**arguments(tmp_path / "run", max_steps=3))
        Trainer(model=model, args=args, train_dataset=tokens).train()
        return adapter_tensors(model)

    places = dict.fromkeys(["embed_tokens", "rotary_emb", "layers.1", "norm"], "cpu") | {"layers.0": "disk"}
    device_map = {"lm_head": "disk"} | {f"model.{name}": place for name, place in places.items()}
    on_disk = train(device_map=device_map, offload_folder=tmp_path / "offload")
    assert any((tmp_path / "offload").iterdir())
    assert_same(on_disk, train())


def assert_compiled_is_eager(folder: Path, **how: Any) -> None:
    """Compare the loss and the gradients of a step, compiled to one graph, with those of the eager one."""

    def step(compile_it: bool) -> tuple[Tensor, dict[str, Tensor]]:
        model = with_adapters(load(folder))
        run = torch.compile(model, fullgraph=True, **how) if compile_it else model
        ids = inputs(model)["input_ids"]
        loss = run(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.detach(), adapter_gradients(model)

    loss, expected = step(compile_it=False)
    compiled_loss, found = step(compile_it=True)
    torch.testing.assert_close(compiled_loss, loss)
    assert_close(found, expected)


def test_a_whole_model_with_adapters_compiles_to_one_graph(tiny_llama: Path) -> None:
    assert_compiled_is_eager(tiny_llama, backend="aot_eager")


@pytest.mark.slow
# torch's own import of its inductor warns of its own use of TorchScript
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_whole_model_with_adapters_compiles_with_inductor(tiny_llama: Path) -> None:
    assert_compiled_is_eager(tiny_llama)


def test_resuming_from_a_checkpoint_ends_where_training_through_does(
    tiny_llama: Path, tokens: Dataset, tmp_path: Path
) -> None:
    def train(resume: str | None = None, **given: Any) -> dict[str, Tensor]:
        model = with_adapters(load(tiny_llama))
        args = TrainingArguments(**arguments(tmp_path, save_strategy="steps", save_steps=2, **given))
        Trainer(model=model, args=args, train_dataset=tokens).train(resume_from_checkpoint=resume)
        return adapter_tensors(model)

    through = train(max_steps=4)
    files = {file.name for file in (tmp_path / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files
    resumed = train(resume=str(tmp_path / "checkpoint-2"), max_steps=4)
    assert_same(through, resumed)


def test_trainer_refuses_a_quantized_model_without_adapters(
    tiny_llama: Path, tokens: Dataset, tmp_path: Path
) -> None:
    args = TrainingArguments(**arguments(tmp_path))
    with pytest.raises(ValueError, match="attach trainable adapters"):
        Trainer(model=load(tiny_llama), args=args, train_dataset=tokens)

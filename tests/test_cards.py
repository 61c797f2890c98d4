"""The model cards of bases and adapters say what modq knows, and leave alone what others wrote."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

import modq
from modq.hf.card import write_base_card, write_training_card

RUN = {
    "model": "me/base",
    "backend": "nf4",
    "data": {"train": "/data/secret/train.jsonl", "examples": 120},
    "recipe": {"r": 8, "alpha": 16, "learning_rate": 0.0002, "resumed": None},
    "result": {"steps": 2, "train_loss": 1.23456789, "eval_loss": 1.5},
    "versions": {"modq": "0.1.0", "torch": "2.13.0"},
}


def quantized(folder: Path, cls: Any = AutoModelForCausalLM, **more: Any) -> Any:
    return cls.from_pretrained(folder, quantization_config=modq.ModqConfig("nf4", **more))


def adapted(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))


def card_in(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


# Bases


def test_the_card_of_a_base_says_how_it_was_quantized(tiny_llama: Path, tmp_path: Path) -> None:
    model = quantized(tiny_llama, layers={"down_proj": {"block_size": 32}})
    write_base_card(tmp_path, model, "org/dense", name="me/base")
    card = card_in(tmp_path)
    assert card.data.to_dict() == {
        "base_model": "org/dense",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["modq", "quantized", "nf4"],
    }
    version = modq.__version__
    for fact in (
        "# me/base",
        f"| `nf4(block_size=32, double_quant=True, quant_type='nf4')` | modq-nf4 {version} | 2 | 4.26 |",
        f"| `nf4(block_size=64, double_quant=True, quant_type='nf4')` | modq-nf4 {version} | 12 | 4.141 |",
        "14 linear layers are quantized by modq",
        "- Size: 0.06603 MB; with all layers dense it would be 0.2798 MB",
        "- Quantized from: org/dense",
        f"- Hash of the source weights: `{model.config.quantization_config.resolved['source']}`",
        "installed:\n\n```python\nfrom transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("me/base")\n```',
    ):
        assert fact in card.text


def test_other_architectures_are_loaded_by_their_own_class(tiny: Callable[..., Path], tmp_path: Path) -> None:
    write_base_card(tmp_path, quantized(tiny("t5"), AutoModelForSeq2SeqLM))
    card = card_in(tmp_path)
    assert 'model = T5ForConditionalGeneration.from_pretrained("this folder")' in card.text
    assert card.data.pipeline_tag != "text-generation"


def test_saving_alone_writes_no_card(tiny_llama: Path, tmp_path: Path) -> None:
    quantized(tiny_llama).save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()


def test_a_card_that_is_there_keeps_its_text_and_gets_one_section(tiny_llama: Path, tmp_path: Path) -> None:
    before = "---\nlicense: mit\nbase_model: org/chosen\ntags:\n- mine\n---\n# Mine\n\nIt is fair.\n"
    (tmp_path / "README.md").write_text(before)
    write_base_card(tmp_path, quantized(tiny_llama), "org/dense")
    with (tmp_path / "README.md").open("a") as file:
        file.write("\nMore of mine.\n")
    write_base_card(tmp_path, quantized(tiny_llama, block_size=32), "org/dense")
    card = card_in(tmp_path)
    assert card.text.startswith("# Mine\n\nIt is fair.\n")
    assert card.text.endswith("\nMore of mine.\n")
    assert (card.text.count("## Quantization"), card.text.count("block_size=32")) == (1, 1)
    assert "block_size=64" not in card.text
    assert (card.data.license, card.data.base_model) == ("mit", "org/chosen")
    assert card.data.tags == ["mine", "modq", "quantized", "nf4"]


FORM = ModelCard.from_template(ModelCardData()).text


@pytest.mark.parametrize(
    "text",
    ["Just text, no front matter.\n", "## Uses\n\n[More Information Needed]\n", f"{FORM}\nMine.\n", ""],
)
def test_any_text_of_a_user_stays(text: str, tiny_llama: Path, tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.ERROR)  # the client says that there was no front matter
    (tmp_path / "README.md").write_text(text)
    write_base_card(tmp_path, quantized(tiny_llama))
    assert card_in(tmp_path).text.startswith(text.rstrip())
    assert "## Quantization" in card_in(tmp_path).text


def test_a_reloaded_base_is_not_said_to_be_quantized_from_itself(tiny_llama: Path, tmp_path: Path) -> None:
    quantized(tiny_llama).save_pretrained(tmp_path / "packed")
    write_base_card(tmp_path, AutoModelForCausalLM.from_pretrained(tmp_path / "packed"))
    assert "Quantized from" not in card_in(tmp_path).text
    assert "- Hash of the source weights" in card_in(tmp_path).text


# Adapters


def test_the_card_of_an_adapter_says_which_base_it_has(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_llama.parent)
    model = quantized(Path(tiny_llama.name))  # looks like a name on the hub, and is a folder
    adapted(model).save_pretrained(tmp_path)
    card = card_in(tmp_path)
    assert card.data.to_dict() == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "transformers", "modq", "nf4"],
    }
    assert f"modq-nf4 {modq.__version__} | 14 | 4.14 |" in card.text
    assert (
        f"- Hash of the source weights: `{model.config.quantization_config.resolved['source']}`" in card.text
    )
    assert "- PEFT " in card.text  # what PEFT says of itself
    assert not any(word in card.text for word in ("q_proj", "bitsandbytes", "More Information Needed"))
    assert tiny_llama.name not in str(card)


def test_the_card_of_an_adapter_over_a_dense_base_is_as_peft_writes_it(
    tiny_llama: Path, tmp_path: Path
) -> None:
    adapted(AutoModelForCausalLM.from_pretrained(tiny_llama)).save_pretrained(tmp_path)
    assert "modq" not in str(card_in(tmp_path))
    assert "[More Information Needed]" in card_in(tmp_path).text


def test_the_training_is_told_without_folders_and_once(tiny_llama: Path, tmp_path: Path) -> None:
    adapted(quantized(tiny_llama)).save_pretrained(tmp_path)
    write_training_card(tmp_path, {**RUN, "recipe": {"r": 99}})
    write_training_card(tmp_path, RUN)
    adapted(quantized(tiny_llama)).save_pretrained(tmp_path)  # PEFT writes its card again
    card = card_in(tmp_path)
    told = card.text.partition("## Training\n\n")[2].partition("\n<!--")[0].splitlines()
    assert told == [
        "- Data: train train.jsonl, examples 120",
        "- Recipe: r 8, alpha 16, learning_rate 0.0002",
        "- Result: steps 2, train_loss 1.235, eval_loss 1.5",
        "- Versions: modq 0.1.0, torch 2.13.0",
    ]
    assert (card.text.count("## Training"), card.text.count("## The base")) == (1, 1)
    assert "secret" not in str(card)


def test_after_a_trainer_of_trl_it_is_one_valid_card(tiny_llama: Path, tmp_path: Path) -> None:
    trainer = SFTTrainer(
        model=quantized(tiny_llama),
        args=SFTConfig(str(tmp_path), max_steps=1, save_steps=1, report_to="none", use_cpu=True),
        train_dataset=Dataset.from_list([{"text": "the union is strong"}] * 2),
        processing_class=AutoTokenizer.from_pretrained(tiny_llama),
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model(str(tmp_path))
    write_training_card(tmp_path, RUN)
    card = card_in(tmp_path)
    headings = [line for line in card.text.splitlines() if line.startswith("## ")]
    assert headings == [
        "## Quick start",
        "## Training procedure",
        "## Citations",
        "## The base",
        "## Training",
    ]
    assert {"modq", "nf4", "lora", "sft", "trl"} <= set(card.data.tags)
    assert card.data.library_name == "peft"
    assert tiny_llama.name not in str(card)


def test_after_the_plain_trainer_too(tiny_llama: Path, tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = Trainer(model=adapted(quantized(tiny_llama)), args=arguments)
    trainer.save_model()
    trainer.create_model_card(model_name="mine")
    card = card_in(tmp_path)
    assert card.text.count("## The base") == 1
    assert "modq" in card.data.tags


def test_a_merged_base_has_no_source_to_tell(tiny_llama: Path, tmp_path: Path) -> None:
    model = adapted(quantized(tiny_llama))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    write_base_card(tmp_path, model.merge_and_unload())
    assert "Hash of the source weights" not in card_in(tmp_path).text

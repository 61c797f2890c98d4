"""Trains a LoRA adapter on a model, quantized or not, with TRL's SFTTrainer unmodified."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modq.errors import ModqError, OptionError
from modq.model import dense_linears, quantized_layers
from modq.train.data import Rows

Report = Callable[[int, int, float], None]
"""Called with (step, steps, loss) while training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraRecipe:
    """How an adapter is trained. The defaults are those of QLoRA, scaled to one small machine."""

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    learning_rate: float = 2e-4
    epochs: float = 1.0
    max_steps: int = -1  # -1: as many as the epochs take
    batch_size: int = 4
    gradient_accumulation: int = 1
    optim: str = "adamw_torch"
    max_length: int = 512
    seed: int = 0
    gradient_checkpointing: bool = True
    report_every: int = 10


@dataclass(frozen=True, slots=True)
class Trained:
    """What training came to."""

    steps: int
    seconds: float
    train_loss: float
    trainable_parameters: int
    eval_loss_before: float | None = None
    eval_loss: float | None = None


class MissingTrainerError(ModqError):
    """A package that training needs and inference does not is not installed."""


def train_adapter(
    model: Any,
    tokenizer: Any,
    rows: Rows,
    recipe: LoraRecipe,
    output: Path,
    eval_rows: Rows | None = None,
    report: Report | None = None,
) -> tuple[Any, Trained]:
    """Train LoRA on every linear of `model` and write the adapter and the tokenizer to `output`.

    Args:
        model: a causal language model; PEFT puts the adapter's layers inside it.
        tokenizer: its tokenizer.
        rows: the examples.
        recipe: how to train.
        output: the folder of the adapter.
        eval_rows: scored before and after training, if given.
        report: told about the loss as it goes.

    Returns:
        The model with its adapter, in evaluation mode, and what training came to.
    """
    started = time.perf_counter()
    # The Trainer seeds torch for the data order, PEFT draws A from the same state: not the caller's.
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        trainer = _trainer(model, tokenizer, rows, recipe, output, eval_rows, report)
        before = _eval_loss(trainer, eval_rows)
        result = trainer.train()
        after = _eval_loss(trainer, eval_rows)
    trainer.save_model(str(output))  # the tokenizer goes along
    trained = trainer.model.eval()
    adapter = sum(parameter.numel() for parameter in trained.parameters() if parameter.requires_grad)
    seconds = time.perf_counter() - started
    return trained, Trained(result.global_step, seconds, result.training_loss, adapter, before, after)


def _trainer(
    model: Any,
    tokenizer: Any,
    rows: Rows,
    recipe: LoraRecipe,
    output: Path,
    eval_rows: Rows | None,
    report: Report | None,
) -> Any:
    from peft import LoraConfig
    from transformers import PrinterCallback

    try:
        from trl import SFTTrainer
    except ImportError as error:
        raise MissingTrainerError(
            f"training needs trl and datasets ({error}): pip install 'modq[train]'"
        ) from error
    _check_names(model, recipe)
    lora = LoraConfig(
        r=recipe.r,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=_as_peft_takes_it(recipe.target_modules),
        task_type="CAUSAL_LM",
    )
    trainer = SFTTrainer(
        model=model,
        args=_arguments(model, recipe, output),
        train_dataset=_dataset(rows),
        eval_dataset=_dataset(eval_rows) if eval_rows else None,
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[_reporter(report)] if report else None,
    )
    trainer.remove_callback(PrinterCallback)  # it would print a dictionary a step
    return trainer


def _check_names(model: Any, recipe: LoraRecipe) -> None:
    """Say in a line what transformers and PEFT would say in a traceback."""
    from transformers.training_args import OptimizerNames

    optimizers = [optimizer.value for optimizer in OptimizerNames]
    if recipe.optim not in optimizers:
        near = difflib.get_close_matches(recipe.optim, optimizers, n=3, cutoff=0.3)
        raise OptionError(
            f"optim={recipe.optim!r} is no optimizer of transformers; near it: {', '.join(near)}"
        )
    layers = (*dense_linears(model), *quantized_layers(model))
    linears = {name.rpartition(".")[2] for name, _ in layers}
    targets = () if isinstance(recipe.target_modules, str) else recipe.target_modules
    if unknown := sorted(set(targets) - linears):
        has = ", ".join(sorted(linears))
        raise OptionError(f"target_modules: the model has no linear {', '.join(unknown)}; it has {has}")


def _as_peft_takes_it(target_modules: str | tuple[str, ...]) -> str | list[str]:
    return target_modules if isinstance(target_modules, str) else list(target_modules)


def _arguments(model: Any, recipe: LoraRecipe, output: Path) -> Any:
    """Translate the recipe. Mixed precision follows the model: float32 stays float32, wherever it runs."""
    from trl import SFTConfig

    return SFTConfig(
        output_dir=str(output),
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        optim=recipe.optim,
        learning_rate=recipe.learning_rate,
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps,
        max_length=recipe.max_length,
        lr_scheduler_type="linear",
        warmup_steps=0.1,  # a share of all steps
        seed=recipe.seed,
        bf16=model.dtype == torch.bfloat16,
        fp16=model.dtype == torch.float16,
        use_cpu=not torch.accelerator.is_available(),  # without it, bf16 on a CPU is refused
        gradient_checkpointing=recipe.gradient_checkpointing,
        logging_steps=recipe.report_every,
        save_strategy="no",  # the adapter is written once, at the end
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _dataset(rows: Rows) -> Any:
    from datasets import Dataset

    return Dataset.from_list([dict(row) for row in rows])


def _eval_loss(trainer: Any, rows: Rows | None) -> float | None:
    return float(trainer.evaluate()["eval_loss"]) if rows else None


def _reporter(report: Report) -> Any:
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):  # type: ignore[misc]  # transformers ships no types
        """Passes the loss on."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], **_: Any) -> None:
            if "loss" in logs:
                report(state.global_step, state.max_steps, float(logs["loss"]))

    return Reporter()

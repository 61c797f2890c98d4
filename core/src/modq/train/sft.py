"""Trains a LoRA adapter on a model, quantized or not, with TRL's SFTTrainer unmodified."""

from __future__ import annotations

import difflib
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modq.errors import ModqError, OptionError
from modq.folders import Interrupted
from modq.model import dense_linears, quantized_layers
from modq.train.checkpoints import last_whole
from modq.train.data import Rows
from modq.train.processes import is_main
from modq.train.progress import History, Report, Watch, peak_memory, stopping

TILE = 2048
"""Columns of logits at a time. TRL's own 32768, meant for GPUs, are all of a small vocabulary, and on a CPU
it holds each tile four times, in float32."""


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
    save_every: int = 100  # steps between checkpoints, where they are kept
    eval_every: int = 100  # steps between evaluations; there is one before and one after in any case


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What training came to; `seconds`, `tokens_per_second` and `peak_memory` are of this session alone."""

    steps: int
    seconds: float
    tokens: int  # without padding, counted once for each time that they were trained on
    tokens_per_second: float
    peak_memory: int  # bytes
    trainable_parameters: int
    history: History

    @property
    def train_loss(self) -> float:
        """The mean loss over all steps."""
        return statistics.fmean(entry["loss"] for entry in self.history.steps)

    @property
    def eval_loss_before(self) -> float | None:
        """The loss on the evaluation data before the first step, if there was such data."""
        return self.history.evals[0]["loss"] if self.history.evals else None

    @property
    def eval_loss(self) -> float | None:
        """The loss on the evaluation data after the last step, if there was such data."""
        return self.history.evals[-1]["loss"] if self.history.evals else None


class MissingTrainerError(ModqError):
    """A package that training needs and inference does not is not installed."""


def train_adapter(
    model: Any,
    tokenizer: Any,
    rows: Rows,
    recipe: LoraRecipe,
    output: Path,
    *,
    eval_rows: Rows | None = None,
    report: Report | None = None,
    stoppable: bool = False,
    checkpoints: Path | None = None,
) -> tuple[Any, Trained]:
    """Train LoRA on every linear of `model` and write the adapter and the tokenizer to `output`.

    In several processes (torchrun) each calls this, and one writes.

    Args:
        model: a causal language model; PEFT puts the adapter's layers inside it.
        tokenizer: its tokenizer.
        rows: the examples.
        recipe: how to train.
        output: the folder of the adapter.
        eval_rows: scored before, during and after training, if given.
        report: told about each step.
        stoppable: whether Ctrl-C and SIGTERM stop after the step; for the main thread only.
        checkpoints: a folder for checkpoints; training goes on from the last whole one in it. None: none.

    Returns:
        The model with its adapter, in evaluation mode, and what training came to.

    Raises:
        Interrupted: if it was stopped before the last step; a checkpoint of that step was written.
        TrainingError: if the loss is not finite.
    """
    resume = last_whole(checkpoints) if checkpoints else None
    evaluation = {
        "eval_strategy": "steps" if eval_rows else "no",
        "eval_on_start": bool(eval_rows) and resume is None,
        "eval_steps": recipe.eval_every,
    }
    saving = {
        "output_dir": str(checkpoints or output),
        "save_strategy": "steps" if checkpoints else "no",
        "save_steps": recipe.save_every,
        "save_total_limit": 2,  # the last may not be whole when the processes are killed
    }
    # The Trainer seeds torch for the data order, PEFT draws A from the same state: not the caller's.
    with torch.random.fork_rng(), small_tiles():
        torch.manual_seed(recipe.seed)
        trainer = _trainer(model, tokenizer, rows, eval_rows, recipe, **evaluation, **saving)
        with stopping() if stoppable else nullcontext() as stop:
            trainer.add_callback(Watch(report, stop))
            started = time.perf_counter()
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        seconds = time.perf_counter() - started
        _check_finished(trainer, checkpoints)
        if eval_rows and History.of(trainer.state.log_history).evals[-1]["step"] < trainer.state.global_step:
            trainer.evaluate()
    _save(trainer, output)
    return trainer.model.eval(), _summary(trainer, seconds)


@contextmanager
def small_tiles() -> Iterator[None]:
    """Let TRL's loss hold TILE columns of the logits at a time, and recompute them in the backward pass.

    Where Triton runs, TRL's own tiles are kept: they are as few kernels as possible there.
    """
    from trl.trainer import utils

    name = "_CHUNKED_LOGPROB_CHUNK_SIZE"  # read at each call; that it is a test sees
    theirs = getattr(utils, name)
    setattr(utils, name, theirs if torch.cuda.is_available() else min(TILE, theirs))
    try:
        yield
    finally:
        setattr(utils, name, theirs)


def fused_head(model: Any) -> None:
    """Give a model the loss that SFTTrainer gives it: without logits, in tiles."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))


def _check_finished(trainer: Any, checkpoints: Path | None) -> None:
    step, steps = trainer.state.global_step, trainer.state.max_steps
    if step < steps:
        way_on = "a checkpoint was written, add --resume to go on" if checkpoints else "nothing was kept"
        raise Interrupted(f"stopped at step {step} of {steps}; {way_on}")


def _save(trainer: Any, output: Path) -> None:
    """Write the adapter and the tokenizer, whichever way the model is sharded."""
    trainer.save_model(str(output))
    if is_main():
        (output / "training_args.bin").unlink()  # a pickle, which nobody should load


def _summary(trainer: Any, seconds: float) -> Trained:
    state = trainer.state
    return Trained(
        steps=state.global_step,
        seconds=seconds,
        tokens=state.num_input_tokens_seen,
        tokens_per_second=(state.num_input_tokens_seen - trainer._initial_num_input_tokens_seen) / seconds,
        peak_memory=peak_memory(),
        trainable_parameters=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        history=History.of(state.log_history),
    )


def _trainer(
    model: Any,
    tokenizer: Any,
    rows: Rows,
    eval_rows: Rows | None,
    recipe: LoraRecipe,
    **given: Any,
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
        args=_arguments(model, recipe, **given),
        train_dataset=_dataset(rows),
        eval_dataset=_dataset(eval_rows) if eval_rows else None,
        processing_class=tokenizer,
        peft_config=lora,
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


def _arguments(model: Any, recipe: LoraRecipe, **given: Any) -> Any:
    """Translate the recipe. Mixed precision follows the model: float32 stays float32, wherever it runs."""
    from trl import SFTConfig

    return SFTConfig(
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
        logging_steps=1,  # a resumed run has the whole history, whatever the step it was stopped at
        logging_nan_inf_filter=False,  # a loss that is not finite must show
        include_num_input_tokens_seen="non_padding",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,  # every adapter takes part in every step
        **given,
    )


def _dataset(rows: Rows) -> Any:
    from datasets import Dataset

    return rows if isinstance(rows, Dataset) else Dataset.from_list([dict(row) for row in rows])

"""What `modq finetune` does: a model and data in, a folder with an adapter and the training's record out."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import modq
from modq.folders import write_json
from modq.hf.card import write_training_card
from modq.train.checkpoints import drop_damaged, last_step
from modq.train.data import Rows, fingerprint, read_rows
from modq.train.models import load_model, load_tokenizer, read_config, within_context
from modq.train.plot import plot_losses
from modq.train.processes import is_main, process_count
from modq.train.progress import Report
from modq.train.sft import LoraRecipe, Trained, train_adapter
from modq.train.unfinished import Unfinished

SCHEMA = 2
"""The version of train.json."""

CHECKPOINTS = "checkpoints"
"""The folder of the Trainer's checkpoints, beside the unfinished result."""

CUT = 512
"""Tokens an example where the user does not say, or the model's context where that is less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Which adapter to train: on what model, quantized how, from which data.

    `data` and `eval_data` are as `read_rows` takes them. `max_length` of None is `CUT` tokens, or the model's
    context where that is less; it takes the place of the recipe's.
    """

    model: str
    data: str
    output: Path
    recipe: LoraRecipe
    max_length: int | None = None
    backend: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "auto"
    eval_data: str | None = None


def finetune(
    job: Job, *, resume: bool = False, report: Report | None = None, stoppable: bool = False
) -> Trained:
    """Train an adapter and write it, the tokenizer, train.json and loss.png to the new folder `job.output`.

    What was stopped or killed is kept in a folder beside it, see `Unfinished`. In several processes
    (torchrun) each calls this, and one writes.

    Args:
        job: what to do.
        resume: whether to go on with a run of this very job that was stopped.
        report: told about each step.
        stoppable: whether Ctrl-C and SIGTERM stop after the step; for the main thread only.

    Raises:
        ModqError: if the model, the data or the output folder is not usable, before training.
        Interrupted: if the user stopped it.
    """
    length = within_context(job.model, read_config(job.model), job.max_length, CUT, "--max-length")
    recipe = dataclasses.replace(job.recipe, max_length=length)
    run = Unfinished(job.output, lambda run: last_step(run.folder / CHECKPOINTS))
    with run.writing(_asked(job, recipe), resume=resume) as result:
        if is_main():
            drop_damaged(run.folder / CHECKPOINTS)
            shutil.rmtree(result, ignore_errors=True)  # of a run that was killed while writing it
        tokenizer = load_tokenizer(job.model)
        rows = read_rows(job.data, tokenizer, recipe.max_length)
        eval_rows = read_rows(job.eval_data, tokenizer, recipe.max_length) if job.eval_data else None
        model = load_model(job.model, backend=job.backend, options=job.options, dtype=_trainable(job))
        _, trained = train_adapter(
            model,
            tokenizer,
            rows,
            recipe,
            result,
            eval_rows=eval_rows,
            report=report,
            stoppable=stoppable,
            checkpoints=run.folder / CHECKPOINTS,
        )
        if is_main():
            record = _asked(job, recipe) | _record(rows, trained) | {"sessions": run.sessions}
            write_json(result / "train.json", record)
            write_training_card(result, record)
            plot_losses(trained.history, result / "loss.png")
    return trained


def _trainable(job: Job) -> str:
    """float16 needs a loss scaler, which needs an accelerator: on a CPU such a model trains in float32."""
    import torch

    if job.dtype != "auto" or torch.cuda.is_available():
        return job.dtype
    return "float32" if read_config(job.model).dtype == torch.float16 else "auto"


def _asked(job: Job, recipe: LoraRecipe) -> dict[str, Any]:
    """Return what decides the result; a resumed run must have the same."""
    return {
        "model": job.model,
        "backend": job.backend,
        "options": dict(job.options),
        "dtype": job.dtype,
        "data": job.data,
        "data_sha256": fingerprint(job.data),
        "eval_data": job.eval_data,
        "eval_data_sha256": fingerprint(job.eval_data) if job.eval_data else None,
        "recipe": asdict(recipe) | {"target_modules": _listed(recipe.target_modules)},
        "processes": process_count(),
    }


def _listed(target_modules: str | tuple[str, ...]) -> str | list[str]:
    return target_modules if isinstance(target_modules, str) else list(target_modules)


def _record(rows: Rows, trained: Trained) -> dict[str, Any]:
    result = asdict(trained)
    history = result.pop("history")
    for name in ("train_loss", "eval_loss_before", "eval_loss"):
        result[name] = getattr(trained, name)
    return {
        "schema": SCHEMA,
        "examples": len(rows),
        "result": result,
        "history": history,
        "versions": {"modq": modq.__version__}
        | {name: version(name) for name in ("torch", "transformers", "peft", "trl")},
    }

"""What `modq finetune` does: a model and a data file in, a folder with an adapter and its record out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import modq
from modq.train.data import Rows, read_rows
from modq.train.folders import new_folder
from modq.train.models import load_model, load_tokenizer
from modq.train.sft import LoraRecipe, Report, Trained, train_adapter

SCHEMA = 1
"""The version of train.json."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Which adapter to train: on what model, quantized how, from which file."""

    model: str
    data: Path
    output: Path
    recipe: LoraRecipe
    backend: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "auto"
    eval_data: Path | None = None


def finetune(job: Job, report: Report | None = None) -> Trained:
    """Train an adapter and write it, the tokenizer and train.json to the new folder `job.output`.

    Raises:
        ModqError: if the model, the data or the output folder is not usable, before training.
    """
    with new_folder(job.output) as unfinished:
        tokenizer = load_tokenizer(job.model)
        rows = read_rows(job.data, tokenizer, job.recipe.max_length)
        eval_rows = read_rows(job.eval_data, tokenizer, job.recipe.max_length) if job.eval_data else None
        model = load_model(job.model, backend=job.backend, options=job.options, dtype=_trainable(job))
        _, trained = train_adapter(model, tokenizer, rows, job.recipe, unfinished, eval_rows, report)
        record = json.dumps(_record(job, rows, trained), indent=2)
        (unfinished / "train.json").write_text(record + "\n", encoding="utf-8")
    return trained


def _trainable(job: Job) -> str:
    """float16 needs a loss scaler, which needs an accelerator: on a CPU such a model trains in float32."""
    import torch
    from transformers import AutoConfig

    if job.dtype != "auto" or torch.cuda.is_available():
        return job.dtype
    stored = AutoConfig.from_pretrained(job.model).dtype
    return "float32" if stored == torch.float16 else "auto"


def _record(job: Job, rows: Rows, trained: Trained) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "model": job.model,
        "backend": job.backend,
        "options": dict(job.options),
        "dtype": job.dtype,
        "data": str(job.data),
        "examples": len(rows),
        "eval_data": str(job.eval_data) if job.eval_data else None,
        "recipe": asdict(job.recipe),
        "result": asdict(trained),
        "versions": {"modq": modq.__version__}
        | {name: version(name) for name in ("torch", "transformers", "peft", "trl")},
    }

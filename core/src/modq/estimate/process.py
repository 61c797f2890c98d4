"""What a process holds that has trained, the model's own memory not counted: interpreter, libraries, pools.

It is measured, not guessed: a new process imports what training imports, trains a model of a few thousand
weights for a step, and says how much was resident at most.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import lru_cache

from modq.errors import ModqError

MARK = "RESIDENT "
_TINY = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}


class ProcessError(ModqError):
    """The process that measures what a process takes did not get to its end."""


@lru_cache(maxsize=2)
def process_bytes(trainer: bool) -> int:
    """Return the resident bytes of a process that has trained next to nothing.

    Args:
        trainer: whether with TRL's trainer, as `modq finetune`, or in a loop of PEFT and torch.

    Raises:
        ProcessError: if that process fails.
    """
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        f"from modq.estimate.process import main; main({trainer})",
    ]
    environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not lines:
        reason = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise ProcessError(
            f"the memory of a process could not be measured: {reason}; is torch installed whole?"
        )
    return int(lines[-1].removeprefix(MARK))


def main(trainer: bool) -> None:
    """Train next to nothing and print the peak of this process."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    import modq.hf  # what loading a quantized model imports
    from modq.train.memory import peak_rss

    if trainer:
        import trl.trainer.sft_trainer

        import modq.train.sft

        assert modq.train.sft, trl.trainer.sft_trainer
    assert modq.hf
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, use_cache=False, **_TINY)).to(torch.bfloat16)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ids = torch.ones(1, 8, dtype=torch.long)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    print(f"{MARK}{peak_rss()}")

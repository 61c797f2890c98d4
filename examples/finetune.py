"""Fine-tunes LoRA on a model that the outlier-int8 plugin quantizes: `python finetune.py MODEL`.

Nothing here is special to the plugin but its name: any backend of `modq list-backends` would do.
"""

from __future__ import annotations

import argparse

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from modq import ModqConfig

TEXT = "We will build a fair future for all of us, and the union is strong. " * 4


def main() -> None:
    """Quantize the model while it loads, take a few steps on one text, save the adapter."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("model", help="the folder of a transformers model, or its name on the hub")
    parser.add_argument("--output", default="adapter", help="where the adapter goes")
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()

    torch.manual_seed(0)  # of LoRA's first values
    config = ModqConfig("outlier-int8", kept=0.02)
    model = AutoModelForCausalLM.from_pretrained(given.model, quantization_config=config)
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    model.print_trainable_parameters()

    ids = AutoTokenizer.from_pretrained(given.model)(TEXT, return_tensors="pt").input_ids
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(given.steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}  loss {loss.item():.4f}")
    model.save_pretrained(given.output)


if __name__ == "__main__":
    main()

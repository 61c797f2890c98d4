"""Lets a model continue a prompt."""

from __future__ import annotations

from typing import Any

import torch

from modq.errors import CheckpointError, OptionError


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    chat: bool = False,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """Return the continuation of a prompt, without the prompt.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompt: the text to continue, or a user's message.
        chat: whether to put the prompt through the tokenizer's chat template.
        max_new_tokens: how much to write at most.
        temperature: 0 takes the likeliest token each time; above, tokens are drawn.
        seed: of the draws; the caller's random state is left alone.

    Raises:
        CheckpointError: if `chat` is asked of a tokenizer without a chat template.
        OptionError: if prompt and continuation are longer than the model's context.
    """
    if chat and not tokenizer.chat_template:
        raise CheckpointError("the model's tokenizer has no chat template; leave --chat out")
    text = prompt
    if chat:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    encoded = tokenizer(text, return_tensors="pt", add_special_tokens=not chat).to(model.device)
    tokens, context = encoded["input_ids"].shape[1], getattr(model.config, "max_position_embeddings", None)
    if context is not None and tokens + max_new_tokens > context:
        raise OptionError(
            f"a prompt of {tokens} tokens and {max_new_tokens} new ones are more than the model's context, "
            f"{context} tokens; shorten the prompt or lower --max-new-tokens"
        )
    drawn = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        out = model.eval().generate(**encoded, max_new_tokens=max_new_tokens, **drawn)
    continuation: str = tokenizer.decode(out[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    return continuation

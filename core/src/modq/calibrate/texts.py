"""Makes calibration samples: windows of tokens, drawn from a text without overlap."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from modq.calibrate.replay import CalibrationError, Sample


def text_samples(
    texts: Iterable[str], tokenizer: Any, *, samples: int, length: int, seed: int = 0
) -> list[Sample]:
    """Join texts, an end-of-text token after each, cut them into windows and draw some.

    Args:
        texts: any texts; one long one will do.
        tokenizer: the model's.
        samples: how many windows to draw.
        length: tokens in a window.
        seed: of the draw.

    Raises:
        CalibrationError: if there are fewer tokens than asked for.
    """
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    windows = len(ids) // length
    if windows < samples:
        raise CalibrationError(
            f"the calibration text has {len(ids):,} tokens, expected {samples} samples of {length} tokens, "
            f"{samples * length:,} in all; give more text, or ask for fewer or shorter samples"
        )
    drawn = torch.randperm(windows, generator=torch.Generator().manual_seed(seed))[:samples]
    tokens = torch.tensor(ids[: windows * length]).view(windows, length)
    return [{"input_ids": tokens[number : number + 1]} for number in drawn.tolist()]


def as_samples(calibration: Iterable[Any], config: Any) -> list[Sample]:
    """Take samples as users hold them: tensors of token ids, or the batches of a data loader.

    A model with a decoder of its own is given the same ids there, too, where none are given.
    """
    samples: list[Sample] = []
    for entry in calibration:
        if not isinstance(entry, Tensor | Mapping):
            raise CalibrationError(
                f"calibration holds a {type(entry).__name__}, expected tensors of token ids (rows, tokens), "
                "or dictionaries of a model's arguments"
            )
        given = {"input_ids": entry} if isinstance(entry, Tensor) else dict(entry)
        given.pop("labels", None)  # the loss is not needed
        if "input_ids" in given and getattr(config, "is_encoder_decoder", False):
            given.setdefault("decoder_input_ids", given["input_ids"])
        samples.append(given)
    if not samples:
        raise CalibrationError("calibration holds no sample")
    return samples

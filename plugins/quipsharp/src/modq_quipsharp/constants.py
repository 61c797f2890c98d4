"""Keeps constant tables on each device: to copy one to an accelerator anew would wait for it."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

_KEPT: dict[tuple[Hashable, torch.device, torch.dtype | None], Tensor] = {}


def constant(
    name: Hashable, build: Callable[[], Tensor], device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """Return what `build` makes, on `device` and in `dtype` or its own; it is made once for each name."""
    key = (name, device, dtype)
    if key in _KEPT:
        return _KEPT[key]
    with torch.inference_mode(False):  # a kept inference tensor would be unusable outside
        table = build().to(device=device, dtype=dtype)
    if type(table) is Tensor:  # not one of a tracer's stand-ins
        _KEPT[key] = table
    return table

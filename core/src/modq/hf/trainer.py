"""What a Trainer sends to the hub beside the model: the adapter's side file, and modq's facts in the card.

TRL's trainers write the card over, and a checkpoint that is pushed while training goes on is copied by a list
of file names.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.trainer import Trainer

from modq.hf.card import write_card
from modq.hf.provenance import FILE
from modq.hf.wrap import wrap
from modq.model import quantized_layers


def _pushing(push: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        create = self.create_model_card

        def create_and_complete(*args: Any, **kwargs: Any) -> None:
            create(*args, **kwargs)
            model = self.accelerator.unwrap_model(self.model)
            if self.is_world_process_zero() and any(quantized_layers(model)):
                write_card(self.args.output_dir, model, self.hub_model_id)

        self.create_model_card = create_and_complete
        try:
            return push(self, *args, **kwargs)
        finally:
            del self.create_model_card

    return wrapped


def _pushing_checkpoint(push: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: Any, checkpoint_folder: str, *args: Any, **kwargs: Any) -> Any:
        side_file = Path(checkpoint_folder, FILE)
        if self.is_world_process_zero() and side_file.is_file():
            shutil.copy(side_file, self.args.output_dir)
        return push(self, checkpoint_folder, *args, **kwargs)

    return wrapped


wrap(Trainer, "push_to_hub", _pushing)
wrap(Trainer, "_push_from_checkpoint", _pushing_checkpoint)

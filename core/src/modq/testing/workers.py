"""What checks run in other processes: `python -m modq.testing.workers NAME ARGUMENTS`.

A worker is a function of this module marked `@worker`; it takes texts, and leaves files.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from modq.testing.check import Breach

TIMEOUT = 300
"""Seconds after which a process is given up: on a busy machine importing torch takes some."""

WORKERS: dict[str, Callable[..., None]] = {}
"""The workers by name."""


def worker(run: Callable[..., None]) -> Callable[..., None]:
    """Make a worker of a function."""
    WORKERS[run.__name__] = run
    return run


def run_worker(name: str, *arguments: str, env: Mapping[str, str] | None = None) -> str:
    """Run a worker in a new process and return what it prints.

    Raises:
        Breach: if it fails; it has the last line of what the process said.
    """
    return run_python("-m", "modq.testing.workers", name, *arguments, env=env)


def run_python(*arguments: str, env: Mapping[str, str] | None = None) -> str:
    """Run this Python, with this path, in a new process and return what it prints."""
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env={**os.environ, "PYTHONPATH": path, **(env or {})},
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()
        last = said[-1] if said else "it said nothing"
        raise Breach(f"another process ended with {done.returncode}: {last}")
    return done.stdout


@worker
def compute_products(folder: str, threads: str) -> None:
    """Compute Ŵ and products of what `modq.testing.checks.state` left in a folder, from the files alone."""
    import torch  # only the workers that compute need it
    from safetensors.torch import load_file, save_file

    from modq.api import dequantize
    from modq.op import unstored
    from modq.registry import load

    torch.set_num_threads(int(threads))  # another number of threads may sum in another order
    results = {}
    for path in sorted(Path(folder).glob("weight*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        loaded = load_file(path.with_suffix(".safetensors"))
        # copies are aligned, as in any model; where a file places them is not, and sums may differ by it
        tensors = {name: tensor.clone() for name, tensor in loaded.items()}
        x = tensors.pop(record["x"])
        qweight = unstored([tensors[name] for name in sorted(tensors)], record["handle"])
        results[f"{path.stem}.dense"] = dequantize(qweight)
        hooks = load(qweight.backend)  # the custom op would wait seconds for torch.compile's import
        results[f"{path.stem}.product"] = hooks.matmul(x=x, qweight=qweight, transpose=False)
    save_file(results, Path(folder) / "results.safetensors")


if __name__ == "__main__":
    WORKERS[sys.argv[1]](*sys.argv[2:])

"""Trains in several processes, as `torchrun` starts them: `python -m modq.testing.processes NAME FOLDER`.

The model is two quantized layers with a LoRA each. The first process saves what one step of training gives,
and the checks compare it with what one process alone gets.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from math import lcm
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from modq.linear import QuantLinear
from modq.model import quantized_layers
from modq.testing.check import Breach
from modq.testing.subject import Subject, Variant, gaussian

WORLD = 2
RANK = 4
TIMEOUT = 120
"""Seconds after which processes that wait for each other are ended."""

Step = dict[str, dict[str, Tensor]]
"""What a step gives: `loss`, `gradients` and, from after it, `packed`, each tensor by name."""


class Adapted(nn.Module):
    """A quantized layer with a LoRA, y = layer(x) + x Aᵀ Bᵀ, that has left its start where B is zero."""

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.a = nn.Parameter(gaussian(RANK, layer.in_features, seed=1) / layer.in_features**0.5)
        self.b = nn.Parameter(gaussian(layer.out_features, RANK, seed=2) / 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return y for x of shape (..., in_features)."""
        y: Tensor = self.layer(x) + x @ self.a.T @ self.b.T
        return y


def adapted_model(subject: Subject, variant: Variant) -> tuple[nn.Module, int]:
    """Make a model of two layers, there and back; return it and its in_features."""
    least = lcm(*subject.info.multiple_of)
    wide, narrow = (-(-size // least) * least for size in (96, 64))
    layers = (subject.layer(variant, shape) for shape in ((wide, narrow), (narrow, wide)))
    return nn.Sequential(*(Adapted(layer) for layer in layers)), narrow


def train(model: nn.Module, x: Tensor, parts: int = 1) -> Step:
    """Train one step, so that the mean loss of `parts` processes is that of one with all rows."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    loss = model(x).square().mean()
    loss.backward()
    total = loss.detach().clone()
    if parts > 1:
        dist.all_reduce(total)
    gradients = {_bare(n): _whole(p.grad) for n, p in model.named_parameters() if p.requires_grad}
    optimizer.step()
    return {"loss": {"loss": total / parts}, "gradients": gradients, "packed": packed(model)}


def packed(model: nn.Module) -> dict[str, Tensor]:
    """Return the packed tensors, gathered from the processes where they are sharded."""
    return {
        _bare(f"{name}.{part}"): _whole(tensor)
        for name, layer in quantized_layers(model)
        for part, tensor in layer.named_packed()
    }


def run(name: str, folder: Path) -> None:
    """Run a program in WORLD processes until all have ended.

    Raises:
        Breach: if one fails, with the last line that it said, or if they do not end.
    """
    said = [folder / f"stderr-{rank}" for rank in range(WORLD)]
    port = _free_port()
    processes = [_start(name, folder, rank, port, said[rank]) for rank in range(WORLD)]
    end = time.monotonic() + TIMEOUT
    try:  # if one fails the others may wait for it for ever
        while not any(process.poll() for process in processes) and time.monotonic() < end:
            if all(process.poll() == 0 for process in processes):
                return
            time.sleep(0.05)
        codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    failed = next((rank for rank, code in enumerate(codes) if code), None)
    if failed is None:
        raise Breach(f"{name} in {WORLD} processes has not ended after {TIMEOUT} s")
    lines = said[failed].read_text().split("\n")
    last = next((line for line in reversed(lines) if line.strip()), f"exit code {codes[failed]}")
    raise Breach(f"{name} in {WORLD} processes: process {failed} failed: {last:.400}")


def _start(name: str, folder: Path, rank: int, port: int, said: Path) -> subprocess.Popen[bytes]:
    variables = {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1,
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),  # where the backend is
    }  # fmt: skip
    command = [sys.executable, "-W", "ignore", "-m", "modq.testing.processes", name, str(folder)]
    environment = os.environ | {key: str(value) for key, value in variables.items()}
    with said.open("wb") as file:
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=file)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _whole(tensor: Any) -> Tensor:
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().clone()


def _bare(name: str) -> str:
    return name.removeprefix("module.")  # DistributedDataParallel's


# In each of the processes


def _shard(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model.children():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


WRAPPERS: Mapping[str, Callable[[nn.Module], nn.Module]] = {"ddp": DistributedDataParallel, "fsdp2": _shard}


def _train_wrapped(folder: Path) -> None:
    """Train under each of WRAPPERS; save what came of it, or the error that it is."""
    results: dict[str, Step | str] = {}
    for name, wrap in WRAPPERS.items():
        model, x = torch.load(folder / "given.pt", weights_only=False)  # the check has just written it
        try:
            results[name] = train(wrap(model), x.chunk(WORLD)[dist.get_rank()], WORLD)
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
    if dist.get_rank() == 0:
        torch.save(results, folder / "results.pt")


PROGRAMS: Mapping[str, Callable[[Path], None]] = {"train": _train_wrapped}


def main(name: str, folder: str) -> None:
    """Run one of PROGRAMS in this process, which is one of several."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
    PROGRAMS[name](Path(folder))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

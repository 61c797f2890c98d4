"""What a benchmark's figures depend on, and nothing that tells whose machine it is."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
"""The instruction sets that decide how fast a CPU product is."""


def describe(*packages: str) -> dict[str, Any]:
    """Describe the machine, torch, and the versions of the packages that took part."""
    lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()]
    cpu = {key.strip(): value.strip() for key, _, value in lines}
    flags = cpu.get("flags", "").split()
    return {
        "cpu": cpu.get("model name", "unknown"),
        "flags": [flag for flag in FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **{package: version(package) for package in packages},
    }

"""Which of several processes this one is, as torchrun and accelerate tell by environment variables.

They are read rather than asked of torch.distributed, which is set up only when training begins; what only one
process may do (print, make a folder) begins before.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist


def process_count() -> int:
    """Return how many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the process that prints and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def local_rank() -> int:
    """Return the number of this process on its machine, which is the number of its accelerator."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process; every process must call this at the same point."""
    if process_count() == 1 or not dist.is_initialized():
        return flag
    agreed = torch.tensor([flag], dtype=torch.uint8, device=device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
    return bool(agreed.item())


def wait_for_all() -> None:
    """Wait until every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def part() -> None:
    """Leave the group of processes, at the end of a program: torch warns about those that do not."""
    if dist.is_initialized():
        dist.destroy_process_group()

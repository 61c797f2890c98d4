"""Runs a model up to one of its blocks, with the blocks before it replaced by what they returned.

A transformers model is a few stacks of blocks (nn.ModuleLists) with glue around them: embeddings, masks,
rotary angles, an encoder's last norm. Calibration needs the inputs of block k, which are the outputs of the
quantized block k-1 passed through the glue. So the model's own forward runs for every sample, glue and all,
with each block before k answering with the recorded output of block k-1; block k is handed its arguments, and
there the forward ends. Nothing is assumed of a block's signature: masks that differ from block to block, a
position bias that is passed on, or an encoder's states come out of the model's own code. What is assumed:
blocks run in the order in which they stand, and a loop carries nothing on but what the last block returned.

The alternative, to catch the arguments of the first block and give them to all, fails where they differ.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from modq.errors import ModqError
from modq.model import Scheme

Sample: TypeAlias = Mapping[str, Tensor]
"""The keyword arguments of one forward pass of the model."""

Output: TypeAlias = Any
"""What a block returns: a tensor, or a tuple of tensors and None."""


class CalibrationError(ModqError):
    """A model or data that calibration cannot work with."""


class Reached(Exception):  # noqa: N818  # it is how a forward is ended, nothing is wrong
    """A forward pass came to where it was to end."""


@dataclass(frozen=True, slots=True)
class Block:
    """One block of a stack: `name` is the module's, `index` its place."""

    name: str
    stack: str
    index: int

    @property
    def prefix(self) -> str:
        """How the names of its modules begin."""
        return f"{self.name}."


def find_blocks(model: nn.Module, linears: Iterable[str]) -> list[Block]:
    """Return the blocks of a model that hold any of these linears, and those before them, in their order.

    A stack is an outermost nn.ModuleList with such a linear in it.
    """
    linears, found, stacks = list(linears), [], list[str]()
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{stack}.") for stack in stacks)
        if (
            isinstance(module, nn.ModuleList)
            and not inside
            and any(n.startswith(f"{name}.") for n in linears)
        ):
            stacks.append(name)
            found += [Block(f"{name}.{index}", name, index) for index in range(len(module))]
    return found


def inside_blocks(plan: Mapping[str, Scheme], blocks: Sequence[Block]) -> dict[str, Scheme]:
    """Return the part of a plan that lies inside blocks: what stands outside sees no calibration data.

    Raises:
        CalibrationError: if that is nothing.
    """
    prefixes = tuple(block.prefix for block in blocks)
    inside = {name: scheme for name, scheme in plan.items() if name.startswith(prefixes)}
    if not inside:
        raise CalibrationError("the model has no stack of blocks (nn.ModuleList) with linears to calibrate")
    return inside


class Outputs:
    """What a block returned for each sample: in memory, or in a folder where one is given."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._held: dict[int, Output] = {}

    def put(self, number: int, output: Output) -> None:
        """Keep a sample's output."""
        if self.folder is None:
            self._held[number] = output
            return
        parts = output if isinstance(output, tuple) else (output,)
        tensors = {str(i): part.contiguous() for i, part in enumerate(parts) if part is not None}
        kind = {"length": str(len(parts)) if isinstance(output, tuple) else "-"}
        self.folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, self._path(number), kind)

    def get(self, number: int, device: torch.device) -> Output:
        """Return a sample's output."""
        if self.folder is None:
            return self._held[number]
        with safe_open(self._path(number), "pt", device=str(device)) as file:
            names, length = set(file.keys()), file.metadata()["length"]
            if length == "-":
                return file.get_tensor("0")
            return tuple(file.get_tensor(str(i)) if str(i) in names else None for i in range(int(length)))

    def _path(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{number:06}.safetensors"


class Replay:
    """Runs samples through a model up to a block and through it.

    Args:
        model: in evaluation mode; all that stands outside the blocks must have its weights.
        blocks: all of its blocks, in order.
        samples: what to run.
        device: where the blocks run.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[Block], samples: Sequence[Sample], device: torch.device
    ) -> None:
        self.model, self.blocks, self.samples, self.device = model, blocks, samples, device
        self.outputs: dict[str, Outputs] = {}  # of the last block of each stack that was run
        takes = inspect.signature(model.forward).parameters
        self.arguments = {"use_cache": False} if "use_cache" in takes else {}

    def __len__(self) -> int:
        return len(self.samples)

    def inputs(self, block: Block, number: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments that the model gives a block for a sample.

        Raises:
            CalibrationError: if the model never calls the block.
        """
        caught: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def catch(*args: Any, **kwargs: Any) -> None:
            caught.append((args, kwargs))
            raise Reached

        with self._patched(block, number, catch), torch.no_grad():
            try:
                given = {name: tensor.to(self.device) for name, tensor in self.samples[number].items()}
                self.model(**given, **self.arguments)
            except Reached:
                return caught[0]
        raise CalibrationError(f"the model's forward does not come to {block.name}; it cannot be calibrated")

    def run(self, block: Block, number: int) -> Output:
        """Run a sample through a block; a hook in it may raise `Reached`, which gives None."""
        args, kwargs = self.inputs(block, number)
        try:
            with torch.no_grad():
                return self.model.get_submodule(block.name)(*args, **kwargs)
        except Reached:
            return None

    @contextmanager
    def _patched(self, block: Block, number: int, catch: Callable[..., None]) -> Iterator[None]:
        """Have the blocks before this one answer with what is recorded, and this one catch."""
        answers: dict[str, Output] = {}
        patched: list[nn.Module] = []
        for each in self.blocks[: self.blocks.index(block)]:
            if each.stack not in answers:
                answers[each.stack] = self.outputs[each.stack].get(number, self.device)
        try:
            for each in self.blocks[: self.blocks.index(block) + 1]:
                module = self.model.get_submodule(each.name)
                module.forward = catch if each == block else _answering(answers[each.stack])
                patched.append(module)
            yield
        finally:
            for module in patched:
                del module.forward  # the class's own again


def _answering(output: Output) -> Callable[..., Output]:
    return lambda *args, **kwargs: output

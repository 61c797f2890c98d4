"""Quantizes a checkpoint that need not fit in memory: one block's dense weights at a time.

It is read from safetensors as transformers would: its own loader decides which tensor is which parameter, and
leaves those of the blocks on the disk. It is written a shard a block. What a block returned for each sample
is kept in files, too. In memory are one block, the statistics of its linears, one sample's activations, and
what stands outside the blocks: embeddings, norms, the head.

A block counts as done when the journal says so, which is written after its outputs and its shard. So a run
that was killed goes on with the next block, from the same bytes that it would have seen.
"""

from __future__ import annotations

import ctypes
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.hooks import remove_hook_from_module
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from modq.calibrate.replay import Block, Outputs, find_blocks, inside_blocks
from modq.errors import CheckpointError
from modq.folders import write_json
from modq.hf.config import ModqConfig, resolve
from modq.hf.provenance import hash_weight, join_hashes
from modq.hf.quantizer import default_skips
from modq.linear import QuantLinear
from modq.model import Recipe, Scheme, plan_layers, quantized_layers
from modq.op import handle_content
from modq.spec import Calibration

JOURNAL = "journal.json"

Progress = Callable[[int, int, str], None]
Report = Callable[[Tensor, QuantLinear, Calibration | None], dict[str, Any]]
"""Makes a layer's record, as JSON."""


class Source:
    """A dense checkpoint whose blocks stay on the disk until they are asked for.

    Attributes:
        model: its blocks are on meta, the rest is loaded.
        plan: how each linear inside a block will be quantized.
        left_dense: the planned linears that stand outside any block, and so cannot be calibrated.
    """

    def __init__(self, source: str, recipe: Recipe, dtype: Any, offload: Path) -> None:
        cls = _model_class(source)
        with torch.device("meta"):
            empty = cls(transformers.AutoConfig.from_pretrained(source))
        wanted = plan_layers(empty, recipe, default_skips(empty, recipe))
        self.blocks = find_blocks(empty, wanted)
        self.plan = inside_blocks(wanted, self.blocks)
        self.left_dense = sorted(wanted.keys() - self.plan.keys())
        self.device = torch.accelerator.current_accelerator() or torch.device("cpu")
        with _transformers_maps_no_file():
            self.model = cls.from_pretrained(
                source,
                dtype=dtype,
                device_map=_device_map(empty, self.blocks, str(self.device)),
                offload_folder=offload,
            ).eval()
        self._places = _places_on_disk(self.model)
        remove_hook_from_module(self.model, recurse=True)
        for module in self.model.modules():
            # The hooks leave each module a bound method of its own: a cycle, in which the weights of a linear
            # that is quantized would wait for the collector.
            vars(module).pop("forward", None)

    def load(self, block: Block) -> None:
        """Read a block's tensors."""
        module = self.model.get_submodule(block.name)
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.is_meta and block.prefix + name in self._places:
                place = self._places[block.prefix + name]
                with _open(place["safetensors_file"], framework="pt") as file:
                    value = file.get_tensor(place["weight_name"])
                value = value.to(self.device, getattr(torch, place["dtype"]))
                _set(module, name, value, isinstance(tensor, nn.Parameter))

    def drop(self, block: Block) -> None:
        """Let go of a block's tensors."""
        self.model.get_submodule(block.name).to("meta")


class Writer:
    """Writes a quantized model block by block, and its journal; it is observer and store of the engine.

    Args:
        source: what is quantized.
        work: the folder of the journal and the outputs.
        result: the folder of the checkpoint.
        report: makes a layer's record, as JSON, of (weight, layer, calibration).
        progress: told how many linears are done, of how many, and which one is next.
    """

    def __init__(
        self,
        source: Source,
        work: Path,
        result: Path,
        report: Report,
        progress: Callable[[int, int, str], None],
    ) -> None:
        self.source, self.work, self.result = source, work, result
        self.report, self.progress = report, progress
        journal = read_journal(work)
        self.layers: dict[str, dict[str, Any]] = journal["layers"]
        self.done: list[str] = journal["blocks"]
        self._clock = time.perf_counter()
        result.mkdir(exist_ok=True)

    # The engine's observer

    def begins(self, name: str) -> None:
        """Say which linear is next, or which block."""
        self.progress(len(self.layers), len(self.source.plan), name)

    def quantized(
        self, name: str, weight: Tensor, layer: QuantLinear, calibration: Calibration | None
    ) -> None:
        """Record a layer; of one that is quantized in two steps, the last, and the time of both."""
        content, before = handle_content(layer.handle), self.layers.get(name, {"seconds": 0.0})
        self.layers[name] = {
            **self.report(weight, layer, calibration),
            "seconds": before["seconds"] + time.perf_counter() - self._clock,
            "sha256": hash_weight(weight.T if layer.conv1d else weight),  # as it is stored
            "format_version": content["format_version"],
            "meta": content["meta"],
        }
        self._clock = time.perf_counter()

    # The engine's store

    def finished(self, blocks: Sequence[Block]) -> int:
        """Return how many blocks the journal has."""
        return len(self.done)

    def outputs(self, block: Block) -> Outputs:
        """Keep a block's outputs in a folder of its name."""
        return Outputs(self.work / "outputs" / block.name)

    def load(self, block: Block) -> None:
        """Read a block's tensors."""
        self.source.load(block)
        self._clock = time.perf_counter()

    def save(self, block: Block) -> None:
        """Write a block's shard, then the journal; then its tensors and older outputs can go."""
        module = self.source.model.get_submodule(block.name)
        self._write(self.source.blocks.index(block), module.state_dict(prefix=block.prefix))
        self.done.append(block.name)
        write_json(self.work / JOURNAL, {"blocks": self.done, "layers": self.layers})
        self.source.drop(block)
        _give_back()
        if block.index:
            shutil.rmtree(self.work / "outputs" / f"{block.stack}.{block.index - 1}", ignore_errors=True)

    # The end

    def finish(self, recipe: Recipe) -> Any:
        """Write what stands outside the blocks, index and config; return the model, its blocks on meta."""
        model = self.source.model
        inside = tuple(block.prefix for block in self.source.blocks)
        tied = getattr(model, "all_tied_weights_keys", {})
        outside = {n: t for n, t in model.state_dict().items() if not n.startswith(inside) and n not in tied}
        self._write(len(self.source.blocks), outside)
        self._write_index()
        _expect(model, self.source.plan, self.layers)
        config = ModqConfig.of(recipe)
        source = join_hashes({name: its["sha256"] for name, its in self.layers.items()}, model)
        config.resolved = resolve(quantized_layers(model), source)
        model.config.quantization_config = config
        model.config.save_pretrained(self.result)
        if model.can_generate():
            model.generation_config.save_pretrained(self.result)
        return model

    def _shard(self, number: int) -> Path:
        return self.result / f"model-{number + 1:05}-of-{len(self.source.blocks) + 1:05}.safetensors"

    def _write(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        path = self._shard(number)
        draft = path.with_suffix(".draft")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, draft, {"format": "pt"})
        draft.replace(path)

    def _write_index(self) -> None:
        weight_map: dict[str, str] = {}
        total = 0
        for number in range(len(self.source.blocks) + 1):
            path = self._shard(number)
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            header.pop("__metadata__", None)
            weight_map |= dict.fromkeys(header, path.name)
            total += sum(its["data_offsets"][1] - its["data_offsets"][0] for its in header.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(self.result / "model.safetensors.index.json", index)


def _give_back() -> None:
    """Have the C library return what was freed: glibc keeps pieces below 32 MiB where others lie behind."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def read_journal(work: Path) -> dict[str, Any]:
    """Return the names of the blocks that are done, and the records of their layers by name."""
    path = work / JOURNAL
    if not path.is_file():
        return {"blocks": [], "layers": {}}
    try:
        journal = json.loads(path.read_text(encoding="utf-8"))
        return {"blocks": list(journal["blocks"]), "layers": dict(journal["layers"])}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{str(path)!r} is damaged ({error}); remove its folder and start anew"
        ) from None


def _model_class(source: str) -> Any:
    """Return the class that a checkpoint's config names, of those that transformers itself has."""
    names = transformers.AutoConfig.from_pretrained(source).architectures or ["none"]
    cls = getattr(transformers, names[0], None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise CheckpointError(
            f"{source!r} is of the architecture {names[0]!r}, expected one of transformers; "
            "load it with its own code and use modq.quantize_model(model, …, calibration=…)"
        )
    return cls


def _device_map(model: nn.Module, blocks: Sequence[Block], device: str) -> dict[str, str]:
    """Map the blocks to the disk and all else to the device; every entry is an outermost module."""
    on_disk = {block.name for block in blocks}
    around = {name.rpartition(".")[0] for name in on_disk}
    around |= {".".join(name.split(".")[:i]) for name in around for i in range(name.count(".") + 1)}
    map = dict.fromkeys(on_disk, "disk")
    for name, _ in model.named_modules():
        if name not in around and name not in on_disk and name.rpartition(".")[0] in around:
            map[name] = device
    for name, _ in [*model.named_parameters(), *model.named_buffers()]:
        if name.rpartition(".")[0] in around:  # held by a module that has blocks in it
            map[name] = device
    return map


def _places_on_disk(model: nn.Module) -> Mapping[str, Mapping[str, str]]:
    """Return where transformers left each tensor of the blocks: safetensors_file, weight_name and dtype."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        if (weights := getattr(hook, "weights_map", None)) is not None:
            return weights.dataset.index  # type: ignore[no-any-return]  # accelerate ships no types
    raise CheckpointError("transformers left no weight on the disk to be read block by block")


def _open(path: str, **options: Any) -> Any:
    """Open a safetensors file that is read, not mapped.

    A mapping is private and writable, so a limit of the data memory counts the whole file.
    """
    return safe_open(path, **{**options, "backend": "pread"})


@contextmanager
def _transformers_maps_no_file() -> Iterator[None]:
    """Have from_pretrained, which opens all files of a checkpoint at once, open them so."""
    modules = (transformers.modeling_utils, transformers.integrations.accelerate)
    for module in modules:
        module.safe_open = _open
    try:
        yield
    finally:
        for module in modules:
            module.safe_open = safe_open


def _set(module: nn.Module, name: str, value: Tensor, is_parameter: bool) -> None:
    owner, _, leaf = name.rpartition(".")
    parent = module.get_submodule(owner)
    if is_parameter:
        parent.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    else:
        parent.register_buffer(leaf, value)


def _expect(model: nn.Module, plan: Mapping[str, Scheme], layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Have a quantized layer on meta in the place of each linear that a session before quantized."""
    for name, scheme in plan.items():
        module = model.get_submodule(name)
        if not isinstance(module, QuantLinear):
            layer = QuantLinear.like(module, scheme.backend, scheme.options)
            layer.allocate(layers[name]["format_version"], layers[name]["meta"])
            model.set_submodule(name, layer)

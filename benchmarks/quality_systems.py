"""What the suite `quality` compares: each quantizer of modq at some bits, its own package, and rounding.

Each system writes a checkpoint; a checkpoint is loaded and scored in a process of its own. Settings are the
same on both sides of a comparison: the tokens, group size, symmetry, damping and order of the columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from benchmarks import systems
from benchmarks.systems import GROUP, System, load_gptqmodel, quantize_with_gptqmodel
from modq.calibrate.replay import find_blocks
from modq.demo.packages import TEXT_PACKAGE, package_files
from modq.demo.texts import token_windows
from modq.model import dense_linears
from modq.train.models import load_tokenizer

DAMPING = 0.05
"""GPTQModel's default; of the mean of the Hessian's diagonal."""

OPTQ: dict[str, Any] = {"symmetric": False, "act_order": "group", "damping": DAMPING}
GPTQMODEL: dict[str, Any] = {
    "sym": False,
    "desc_act": False,
    "act_group_aware": True,
    "damp_percent": DAMPING,
}
"""The same, as GPTQModel calls it."""

CALIBRATION_YEARS = range(1947, 2009)
CALIBRATION_TOKENS = 512

Prepare = Callable[[Path, Path, Tensor], None]
"""(dense model, new folder, calibration windows) writes a checkpoint, in float32 where it is not packed."""


def calibration_windows(model: Path, count: int) -> Tensor:
    """Cut the calibration text, US annual messages of 1947 to 2008, into (count, CALIBRATION_TOKENS)."""
    spoken = [path for path in package_files(TEXT_PACKAGE, ".txt") if path.name[:4].isdecimal()]
    documents = tuple(path for path in spoken if int(path.name[:4]) in CALIBRATION_YEARS)
    tokenizer = load_tokenizer(str(model))
    return token_windows(tokenizer, documents, CALIBRATION_TOKENS, count * CALIBRATION_TOKENS)


def load_dense(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load a causal language model with its head, any other model as its bare base."""
    config = transformers.AutoConfig.from_pretrained(str(folder))
    causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures)
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    return auto.from_pretrained(str(folder), dtype=dtype)


def block_linears(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield the linears inside the model's blocks, those that every system here quantizes."""
    linears = dict(dense_linears(model))
    prefixes = tuple(block.prefix for block in find_blocks(model, linears))
    for name, linear in linears.items():
        if name.startswith(prefixes):
            yield name, linear


def _modq(backend: str, *, calibrated: bool = False, **options: Any) -> Prepare:
    def prepare(dense: Path, folder: Path, windows: Tensor) -> None:
        from modq import quantize_model

        model = load_dense(dense)
        calibration = list(windows.split(1)) if calibrated else None
        inside = {name for name, _ in block_linears(model)}
        outside = [name for name, _ in dense_linears(model) if name not in inside]
        quantize_model(
            model, backend, calibration=calibration, modules_to_not_convert=outside, **options
        ).save_pretrained(folder)

    return prepare


def _rounded(bits: int) -> Prepare:
    """Round to the nearest of an even grid between a group's least and greatest weight, kept dense."""

    @torch.no_grad()
    def prepare(dense: Path, folder: Path, windows: Tensor) -> None:
        model = load_dense(dense)
        for _, linear in block_linears(model):
            linear.weight.copy_(round_to_nearest(linear.weight, bits))
        model.config.bits_per_weight = bits + (16 + bits) / GROUP
        model.save_pretrained(folder)

    return prepare


def round_to_nearest(weight: Tensor, bits: int) -> Tensor:
    """Round (out, in) with one float16 scale and one integer zero for each GROUP inputs."""
    groups = weight.unflatten(1, (-1, GROUP))
    low, high = groups.amin(2, keepdim=True).clamp(max=0), groups.amax(2, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).half().float().clamp(min=1e-7)
    zero = (-low / scale).round()
    codes = ((groups / scale).round() + zero).clamp(0, 2**bits - 1)
    return ((codes - zero) * scale).flatten(1)


def _hqq(bits: int) -> Prepare:
    """Quantize with the package hqq, scales in float16; keep the dequantized weights and the stored bits."""

    @torch.no_grad()
    def prepare(dense: Path, folder: Path, windows: Tensor) -> None:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer

        model, config = load_dense(dense), BaseQuantizeConfig(nbits=bits, group_size=GROUP)
        held = weights = 0
        for _, linear in block_linears(model):
            copy = nn.Linear(linear.in_features, linear.out_features, bias=False)
            copy.weight.data.copy_(linear.weight)
            packed = HQQLinear(copy, config, compute_dtype=torch.float16, device="cpu", del_orig=False)
            tensors = (packed.W_q, packed.meta["scale"], packed.meta["zero"])
            held += sum(8 * tensor.numel() * tensor.element_size() for tensor in tensors)
            weights += linear.weight.numel()
            exact = {**packed.meta, "compute_dtype": torch.float32}
            exact |= {name: packed.meta[name].float() for name in ("scale", "zero")}
            linear.weight.copy_(Quantizer.dequantize(packed.W_q, exact))
        model.config.bits_per_weight = held / weights
        model.save_pretrained(folder)

    return prepare


def _gptqmodel(bits: int) -> Prepare:
    def prepare(dense: Path, folder: Path, windows: Tensor) -> None:
        quantize_with_gptqmodel(dense, folder, windows, torch.float32, bits=bits, **GPTQMODEL)

    return prepare


def _ours(prepare: Prepare, setting: str, plugin: str) -> System[Tensor]:
    return System(setting, prepare, load_dense, packages=("modq", f"modq-{plugin}"))


_HQQ_WORDS = "axis 1, float16 scales"
_OPTQ_WORDS = f"asymmetric, order inside groups, damping {DAMPING}"


def _all() -> Iterator[tuple[str, System[Tensor]]]:
    yield "dense", System("not quantized", lambda dense, folder, windows: None, load_dense)
    for bits in (4, 3, 2):
        words = f"{bits} bits, group {GROUP}"
        yield f"rtn-{bits}", System(f"{words}, asymmetric", _rounded(bits), load_dense)
        optq = _modq("optq", calibrated=True, bits=bits, group_size=GROUP, **OPTQ)
        yield f"modq-optq-{bits}", _ours(optq, f"{words}, {_OPTQ_WORDS}", "optq")
        yield (
            f"gptqmodel-{bits}",
            System(
                f"{words}, {_OPTQ_WORDS}",
                _gptqmodel(bits),
                load_gptqmodel(bits),
                peer="gptqmodel",
                packages=("gptqmodel",),
            ),
        )
        hqq = _modq("hqq", bits=bits, group_size=GROUP)
        yield f"modq-hqq-{bits}", _ours(hqq, f"{words}, {_HQQ_WORDS}", "hqq")
        yield (
            f"hqq-{bits}",
            System(f"{words}, {_HQQ_WORDS}", _hqq(bits), load_dense, peer="hqq", packages=("hqq",)),
        )
        quipsharp = _modq("quipsharp", calibrated=True, bits=bits)
        yield f"modq-quipsharp-{bits}", _ours(quipsharp, f"{bits} bits, E8P, no fine-tuning", "quipsharp")
    for bits in (4, 3):  # about the bits a weight that QuIP# takes
        rows = _modq("optq", calibrated=True, bits=bits, group_size=None, **OPTQ)
        yield f"modq-optq-{bits}-rows", _ours(rows, f"{bits} bits, a scale a row, {_OPTQ_WORDS}", "optq")
    quip = _modq("quipsharp", calibrated=True, bits=2, codebook="uniform", rotation="kronecker")
    yield "modq-quip-2", _ours(quip, "2 bits, the original QuIP", "quipsharp")
    eight = _modq("hqq", bits=8, group_size=GROUP)
    yield "modq-affine-8", _ours(eight, f"8 bits, group {GROUP}, by HQQ", "hqq")
    nf4 = _modq("nf4", block_size=GROUP, double_quant=True)
    yield "modq-nf4", _ours(nf4, f"NF4, block {GROUP}, double quantization", "nf4")


SYSTEMS = dict(_all())

LOW_BITS = ("modq-quipsharp-2", "modq-optq-3", "modq-optq-4", "modq-hqq-4", "modq-nf4", "modq-affine-8")
"""What LoRA is trained on beside the dense model, by rising bits."""


def find(name: str) -> System[Any]:
    """Return a system of any suite."""
    return systems.SYSTEMS[name] if name in systems.SYSTEMS else SYSTEMS[name]


PAIRS = {
    f"modq-{ours}-{bits}": f"{peer}-{bits}"
    for ours, peer in (("optq", "gptqmodel"), ("hqq", "hqq"))
    for bits in (4, 3, 2)
}
"""Which of modq's rows is compared with which of a peer's."""

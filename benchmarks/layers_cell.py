"""Times one library on single linears: `python -m benchmarks.layers_cell SETTINGS`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import cell
from benchmarks.quality_systems import GPTQMODEL, GROUP, OPTQ


def main(settings: dict[str, Any]) -> dict[str, Any]:
    """Quantize every shape at every width, some times."""
    torch.set_num_threads(settings["threads"])
    library = LIBRARIES[settings["library"]]
    found: dict[str, Any] = {}
    for rows, columns in settings["shapes"]:
        weight, inputs = random_layer(rows, columns)
        for bits in settings["bits"]:
            measured = [library(weight, inputs, bits) for _ in range(1 + settings["repetitions"])][1:]
            key = f"{rows}x{columns}, {bits} bits"
            found[f"seconds {key}"] = [seconds for seconds, _ in measured]
            found[f"error {key}"] = output_error(weight, measured[0][1], inputs)
    packages = {"gptqmodel": ["gptqmodel"], "hqq": ["hqq"]}.get(settings["library"], ["modq"])
    return {**found, "versions": cell.versions_of(packages)}


def random_layer(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Make a weight (rows, columns) with heavy tails, and inputs (tokens, columns) that are not alike."""
    generator = torch.Generator().manual_seed(rows + columns)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tails = (normal(4, rows, columns) ** 2).mean(dim=0).sqrt()  # Student's t of 4 degrees of freedom
    inputs = normal(4 * columns, columns) * (0.5 * normal(columns)).exp() + normal(4 * columns, 8) @ normal(
        8, columns
    )
    return 0.02 * normal(rows, columns) / tails, inputs


def output_error(weight: Tensor, approximation: Tensor, inputs: Tensor) -> float:
    """Return |(W - Ŵ) X| / |W X|."""
    error = (weight - approximation).double() @ inputs.double().T
    return float(error.norm() / (weight.double() @ inputs.double().T).norm())


def _modq_optq(weight: Tensor, inputs: Tensor, bits: int) -> tuple[float, Tensor]:
    import modq
    from modq.spec import Calibration

    known = Calibration(hessian=inputs.T @ inputs / len(inputs), samples=len(inputs))
    started = time.perf_counter()
    packed = modq.quantize(weight, "optq", known, bits=bits, group_size=GROUP, **OPTQ)
    seconds = time.perf_counter() - started
    return seconds, modq.dequantize(packed)


def _gptqmodel(weight: Tensor, inputs: Tensor, bits: int) -> tuple[float, Tensor]:
    from gptqmodel.looper.named_module import NamedModule
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    config = QuantizeConfig(bits=bits, group_size=GROUP, **GPTQMODEL)
    task = GPTQ(NamedModule(_linear(weight), "linear", "linear", 0), config)
    task.quantizer.configure(perchannel=True)
    task.add_batch(inputs[None], None)
    task.finalize_hessian()
    started = time.perf_counter()
    approximation = task.quantize()[0]
    return time.perf_counter() - started, approximation.float()


def _modq_hqq(weight: Tensor, inputs: Tensor, bits: int) -> tuple[float, Tensor]:
    import modq

    started = time.perf_counter()
    packed = modq.quantize(weight, "hqq", bits=bits, group_size=GROUP)
    seconds = time.perf_counter() - started
    return seconds, modq.dequantize(packed)


def _hqq(weight: Tensor, inputs: Tensor, bits: int) -> tuple[float, Tensor]:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    linear, config = _linear(weight), BaseQuantizeConfig(nbits=bits, group_size=GROUP)
    started = time.perf_counter()
    packed = HQQLinear(linear, config, compute_dtype=torch.float16, device="cpu")
    seconds = time.perf_counter() - started
    return seconds, packed.dequantize().float()


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data.copy_(weight)
    return linear


LIBRARIES: dict[str, Callable[[Tensor, Tensor, int], tuple[float, Tensor]]] = {
    "modq-optq": _modq_optq,
    "gptqmodel": _gptqmodel,
    "modq-hqq": _modq_hqq,
    "hqq": _hqq,
}
"""(weight, inputs, bits) -> the seconds that quantizing took, and the dequantized weight."""

if __name__ == "__main__":
    cell.run(main)

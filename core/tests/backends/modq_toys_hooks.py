"""The implementations of the test backends."""

import torch

from modq import BlockResult, QuantizedWeight, TensorSpec, hookimpl
from modq.layouts import Affine, Codebook, NestedScales

TABLE = (-1.0, -0.3, 0.2, 1.0)
SCALE_TABLE = tuple((i - 127) / 128 for i in range(256))


def affine(shape, meta):
    return Affine(shape, meta["bits"], meta["group_size"], meta["zeros"], torch.float16, meta["permuted"])


class ToyAffine:
    """Round to nearest between each group's ends."""

    @hookimpl
    def describe(self, shape, options):
        return affine(shape, vars(options)).specs()

    @hookimpl
    def quantize(self, weight, options):
        layout, top = affine(tuple(weight.shape), vars(options)), 2**options.bits - 1
        position = torch.arange(weight.shape[1]).flip(0).to(torch.int32) if options.permuted else None
        groups = torch.arange(weight.shape[1]) // options.group_size
        stored = weight.float() if position is None else weight.float()[:, position.long()]
        columns = [stored[:, groups == g] for g in range(layout.groups)]
        low = torch.stack([c.amin(1).clamp(max=0) for c in columns], 1)
        high = torch.stack([c.amax(1).clamp(min=0) for c in columns], 1)
        if options.zeros == "symmetric":
            high = torch.maximum(high, -low)
            low = -high
        scales = ((high - low) / top).clamp(min=1e-6).half()
        zeros = {
            "symmetric": torch.full_like(low, (top + 1) // 2),
            "integer": (-low / scales.float()).round().clamp(0, top),
            "float": (-low / scales.float()).half().float(),
        }[options.zeros]
        codes = (stored / scales.float()[:, groups] + zeros[:, groups]).round().clamp(0, top).to(torch.uint8)
        held = {"symmetric": None, "integer": zeros.to(torch.uint8), "float": zeros.half()}[options.zeros]
        tensors = layout.pack(codes, scales, held, position)
        return QuantizedWeight("toy-affine", 1, tuple(weight.shape), tensors, vars(options).copy())

    @hookimpl
    def dequantize(self, qweight, dtype, rows, columns):
        return affine(qweight.shape, qweight.meta).dequantize(qweight.tensors, dtype, rows, columns)

    @hookimpl
    def layout(self, shape, meta):
        return affine(shape, meta)


def book(shape, meta):
    return Codebook(shape, TABLE, meta["block_size"], NestedScales(SCALE_TABLE) if meta["nested"] else None)


class ToyBook:
    @hookimpl
    def describe(self, shape, options):
        return book(shape, vars(options)).specs()

    @hookimpl
    def quantize(self, weight, options):
        shape = tuple(weight.shape)
        return QuantizedWeight(
            "toy-book", 1, shape, book(shape, vars(options)).encode(weight), vars(options).copy()
        )

    @hookimpl
    def dequantize(self, qweight, dtype, rows, columns):
        return book(qweight.shape, qweight.meta).dequantize(qweight.tensors, dtype, rows, columns)

    @hookimpl
    def matmul(self, x, qweight, transpose):
        return None  # decline: the core's own product must serve


class ToyBare:
    """Keeps the weight in float32, so that nothing is lost, and has no product of its own."""

    NAME = "toy-bare"

    @hookimpl
    def describe(self, shape):
        return {"values": TensorSpec(tuple(shape), torch.float32)}

    @hookimpl
    def quantize(self, weight):
        return QuantizedWeight(self.NAME, 1, tuple(weight.shape), {"values": weight.float().clone()})

    @hookimpl
    def dequantize(self, qweight, dtype, rows, columns):
        return qweight.tensors["values"][rows, columns].to(dtype, copy=True).contiguous()


class ToyCalibrated(ToyBare):
    NAME = "toy-calibrated"


class ToyBlock(ToyBare):
    """Scales the linears of a block together, to where its output is as large as it was."""

    NAME = "toy-block"

    @hookimpl
    def quantize_block(self, weights, options, calibration):
        numbers = range(calibration.samples)
        ours, want = (
            sum(run(n).double().norm() for n in numbers) for run in (calibration.run, calibration.target)
        )
        scale = want / ours if ours else 1.0
        made = {name: weight.float() * scale for name, weight in weights.items()}
        return BlockResult({name: self.quantize(weight) for name, weight in made.items()})

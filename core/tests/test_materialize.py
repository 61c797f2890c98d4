"""Block-wise products: exact cuts, one block of extra memory, the dense product's error."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import modq
from modq.materialize import BLOCK_ELEMENTS, blocks, blockwise_matmul


@pytest.mark.parametrize(
    ("width", "depth", "size"), [(62, 60, 100), (62, 60, 10**9), (7, 60, 1), (1, 5, 2), (10, 3, 9)]
)
def test_blocks_cut_the_width_without_gap_or_overlap(width, depth, size):
    cut = list(blocks(width, depth, size))
    assert [i for part in cut for i in range(part.start, part.stop)] == list(range(width))
    assert all((part.stop - part.start) * depth <= max(size, depth) for part in cut)


@pytest.mark.parametrize("transpose", [False, True], ids=["forward", "transpose"])
def test_only_asked_slices_are_built_and_each_output_is_written_once(transpose, generator):
    weight = torch.randn(62, 60, generator=generator)
    asked = []

    def dequantize_block(rows, columns):
        asked.append((rows, columns))
        return weight[rows, columns]

    x = torch.randn(4, 62 if transpose else 60, generator=generator)
    y = blockwise_matmul(x, dequantize_block, (62, 60), transpose, block_elements=600)
    assert torch.allclose(y, x @ (weight if transpose else weight.T), atol=1e-5)
    whole = slice(0, 62 if transpose else 60)
    assert all((rows if transpose else columns) == whole for rows, columns in asked)
    assert len(asked) > 3


def test_block_edges_do_not_add_error_in_bf16(generator):
    """Summing over blocks in bf16 would: the blocks lie along the dimension that is not summed over."""
    weight = torch.randn(512, 512, generator=generator).bfloat16()
    x = torch.randn(64, 512, generator=generator).bfloat16()
    exact = x.double() @ weight.double()
    small = blockwise_matmul(x, lambda r, c: weight[r, c], (512, 512), True, block_elements=512 * 16)
    dense = x @ weight
    assert (small.double() - exact).norm() <= 1.05 * (dense.double() - exact).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("backend", ["toy-affine", "toy-book"])
def test_a_16384x4096_layer_peaks_at_one_block_above_inputs_and_outputs(backend, direction, dtype):
    """By the allocator's own account of live bytes; the whole matrix in fp32 would be 256 MiB."""
    out_features, in_features, rows = 16384, 4096, 8
    layer = modq.QuantLinear(
        in_features, out_features, backend=backend, options=_default(backend), bias=False
    )
    layer.allocate(1, vars(layer.options), device="cpu")
    for _, tensor in layer.named_packed():
        tensor.data.fill_(1)
    x = torch.ones(rows, in_features, dtype=dtype, requires_grad=True)
    y = layer(x)
    grad = torch.ones_like(y)
    peak = peak_bytes((lambda: layer(x)) if direction == "forward" else (lambda: y.backward(grad)))
    result = (y if direction == "forward" else x).nbytes
    # a block: 4 bytes a weight for its fp32 value and 4 while it is decoded (codes, indices, the cast); where
    # the plugin declines and the core asks for slices, 4 for the slice
    assert peak <= result + BLOCK_ELEMENTS * (12 if backend == "toy-book" else 8)


def _default(backend):
    from modq.options import build_options

    return build_options(backend, {})


def peak_bytes(function):
    """Return the largest number of bytes that `function` held at once beyond what lived before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = function()
    del result
    live = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak

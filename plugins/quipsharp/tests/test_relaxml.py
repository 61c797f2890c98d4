"""Checkpoints of the paper's authors, made here by an encoder of its own, against dense matrices."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from quipsharp_files import pack_tiles
from torch import Tensor

import modq
from modq.errors import CheckpointError
from modq_quipsharp.e8 import e8p_points, e81b_points
from modq_quipsharp.hadamard import hadamard_matrix
from modq_quipsharp.relaxml import read_module, unpack_e8p

M, N = 96, 128
PARTS = [("q_proj", 48), ("k_proj", 16), ("v_proj", 32)]
KINDS = {7: ("E8P12", 1), 17: ("E8P12RVQ4B", 1), 18: ("E8P12RVQ3B", 0)}
every_kind = pytest.mark.parametrize("number", KINDS)


def pack_bytes(codes: Tensor) -> Tensor:
    """Encode (m, n/8) codes below 256 as int64 (m, n/64), the first in the lowest byte."""
    rows = [[sum(int(c) << 8 * i for i, c in enumerate(run)) for run in row.split(8)] for row in codes]
    return torch.tensor([[word - (1 << 64) if word >> 63 else word for word in row] for row in rows])


def module(number: int, parts: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return a random module of theirs, and the dense matrix that it stands for, in float64."""
    g = torch.Generator().manual_seed(number)
    first = torch.randint(0, 65536, (M, N // 8), generator=g)
    dense = e8p_points().double()[first].view(M, N) / 4
    words = [pack_tiles(first)]
    if number == 17:
        second = torch.randint(0, 65536, (M, N // 8), generator=g)
        words.append(pack_tiles(second))
        dense += e8p_points().double()[second].view(M, N) / 4 / 3.45
    elif number == 18:
        second = torch.randint(0, 256, (M, N // 8), generator=g)
        words.append(pack_bytes(second))
        dense += e81b_points().double()[second].view(M, N) / 4 / 2.04
    tensors = {
        "Qidxs": torch.cat(words, dim=1),
        "codebook_id": torch.tensor(number),
        "SU": torch.randn(N, generator=g).half(),
        "SV": (torch.randn(M, generator=g) * 0.02).half(),
        "Wscale": torch.tensor(0.7),
    }
    factors = torch.ones(M, dtype=torch.float64)
    if parts > 1:
        tensors["fuse_scales"] = torch.rand(parts, generator=g) + 0.5
        sizes = torch.tensor([rows for _, rows in PARTS])
        factors = tensors["fuse_scales"].double().repeat_interleave(sizes)
    u_m = torch.kron(hadamard_matrix(12).double(), sylvester(8)) / math.sqrt(M)
    u_n = sylvester(N) / math.sqrt(N)
    rows = factors * tensors["SV"].double() * 0.7
    return tensors, rows[:, None] * (u_m @ dense @ u_n.T) * tensors["SU"].double()


def sylvester(size: int) -> Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < size:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h


def params(number: int, **other: Any) -> dict[str, Any]:
    name, version = KINDS[number]
    return {"codebook": name, "codebook_version": version, "codesz": 8, "fused": True, **other}


def test_the_example_of_the_format_is_read() -> None:
    codes = torch.zeros(16, 8, dtype=torch.int64)
    codes[:2, :2] = torch.tensor([[0x1234, 0xABCD], [0x00FF, 0xE3A5]])
    words = pack_tiles(codes)
    assert int(words.flatten()[0]) & (1 << 64) - 1 == 0xE6B36F2EE3AB0012
    assert torch.equal(unpack_e8p(words).long(), codes)


def test_every_code_comes_back_from_the_tiles() -> None:
    codes = torch.arange(65536).roll(12345).view(256, 256)
    assert torch.equal(unpack_e8p(pack_tiles(codes)).long(), codes)


@every_kind
def test_a_module_is_the_matrix_that_it_stands_for(number: int) -> None:
    tensors, dense = module(number, parts=1)
    layer = read_module(tensors, [("", M)], params(number))[""]
    torch.testing.assert_close(modq.dequantize(layer.qweight, torch.float64), dense, rtol=1e-5, atol=1e-7)
    assert layer.options.bits == {7: 2, 17: 4, 18: 3}[number]
    assert layer.options.part_of == ()


@every_kind
def test_the_linears_of_a_fused_module_are_rows_of_its_matrix(number: int) -> None:
    tensors, dense = module(number, parts=3)
    layers = read_module(tensors, PARTS, params(number))
    assert list(layers) == ["q_proj", "k_proj", "v_proj"]
    x, first = torch.randn(4, N, generator=torch.Generator().manual_seed(1)), 0
    for name, rows in PARTS:
        qweight, expected = layers[name].qweight, dense[first : first + rows]
        specs = modq.api.describe_weight((rows, N), "quipsharp", layers[name].options)
        assert {n: (s.shape, s.dtype) for n, s in specs.items()} == {
            n: (tuple(t.shape), t.dtype) for n, t in qweight.tensors.items()
        }
        torch.testing.assert_close(modq.dequantize(qweight, torch.float64), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            modq.dequantize(qweight, torch.float64)[3:9, 7:100],
            modq.api.dequantize_slice(qweight, torch.float64, slice(3, 9), slice(7, 100)),
        )
        exact = x.double() @ expected.T
        assert (modq.matmul(x, qweight) - exact).norm() <= 1e-5 * exact.norm()
        g = torch.randn(4, rows, generator=torch.Generator().manual_seed(2))
        back = g.double() @ expected
        assert (modq.matmul(g, qweight, transpose=True) - back).norm() <= 1e-5 * back.norm()
        first += rows
    assert layers["q_proj"].qweight.tensors["codes"] is layers["v_proj"].qweight.tensors["codes"]


def test_another_residual_scale_and_rescaled_inputs_are_heeded() -> None:
    tensors, dense = module(17, parts=1)
    plain = read_module(tensors, [("", M)], params(17, resid_scale_override=-1))[""]
    finer = read_module(tensors, [("", M)], params(17, resid_scale_override=4.0))[""]
    assert finer.qweight.meta["residual_scale"] == finer.options.residual_scale == 4.0
    assert (modq.dequantize(finer.qweight) - modq.dequantize(plain.qweight)).norm() > 0.01
    divided = {**tensors, "scaleWH": torch.full((N,), 4.0)}
    found = read_module(divided, [("", M)], params(17, rescale_WH=True))[""].qweight
    torch.testing.assert_close(modq.dequantize(found, torch.float64), dense / 4, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "given", "said"),
    [
        (
            {"codebook_id": torch.tensor(4)},
            {"codebook": "HI4B1C"},
            "codebook_id 4 .'HI4B1C'.; .* reads 7 .E8P12",
        ),
        ({"A": torch.zeros(1)}, {}, "low-rank factors .A."),
        ({"bias": torch.zeros(M)}, {}, "a bias .bias."),
        ({"Qidxs": None}, {}, "lacks Qidxs; is a shard missing"),
        ({"Qidxs": torch.zeros(M, 4, dtype=torch.int32)}, {}, "Qidxs is torch.int32"),
        (
            {"Qidxs": torch.zeros(M, 8, dtype=torch.int64)},
            {},
            r"of shape \(96, 8\), expected torch.int64 of \(96, 4\)",
        ),
        ({"SV": torch.ones(64).half()}, {}, "SV has 64 outputs, expected q_proj 48 . k_proj 16"),
        ({"fuse_scales": torch.ones(2)}, {}, "fuse_scales has 2 numbers, expected 3"),
        ({"SU": torch.full((N,), torch.inf)}, {}, "SU has numbers beyond float16"),
        ({}, {"codebook": "E8P12RVQ3B"}, "config.json has codebook 'E8P12RVQ3B'"),
        ({}, {"codebook_version": 0}, "of version 0, and codebook_id 7 is 'E8P12' of version 1"),
    ],
)
def test_what_is_not_read_is_refused_by_name(
    change: dict[str, Any], given: dict[str, Any], said: str
) -> None:
    tensors, _ = module(7, parts=3)
    changed = {name: t for name, t in {**tensors, **change}.items() if t is not None}
    with pytest.raises(CheckpointError, match=said):
        read_module(changed, PARTS, params(7) | given)

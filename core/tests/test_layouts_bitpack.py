"""The bit stream: test vectors of GPTQ's packing, round trips at every width, and slices equal the whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modq.errors import DtypeError, OptionError, ShapeError
from modq.layouts import bitpack, pack_bits, unpack_bits

WIDTHS = (1, 2, 3, 4, 8)


def random_codes(rows: int, n: int, bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, n), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("bits", "codes", "words"),
    [
        (4, range(8), [0x76543210]),
        (2, [k % 4 for k in range(32)], [0xE4E4E4E4] * 2),
        (3, [k % 8 for k in range(32)], [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),
        (1, [1, 0, 0, 0, 0, 0, 0, 1], [0x81]),
        (8, [1, 2, 255], [0xFF0201]),
    ],
)
def test_packing_gives_the_little_endian_stream_of_gptq(
    bits: int, codes: list[int], words: list[int]
) -> None:
    packed = pack_bits(torch.tensor([list(codes)], dtype=torch.uint8), bits)
    stream = b"".join(word.to_bytes(4, "little") for word in words)
    assert bytes(packed[0].tolist()) == stream[: packed.shape[1]]
    assert not any(stream[packed.shape[1] :])


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(WIDTHS), st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**31), st.data())
def test_a_slice_unpacks_to_the_codes_that_were_packed(
    bits: int, rows: int, n: int, seed: int, data: st.DataObject
) -> None:
    codes = random_codes(rows, n, bits, seed)
    packed = pack_bits(codes, bits)
    assert packed.shape == (rows, -(-n * bits // 8))
    start = data.draw(st.integers(0, n))
    stop = data.draw(st.integers(start, n))
    unpacked = unpack_bits(packed, bits, slice(start, stop))
    assert torch.equal(unpacked, codes[:, start:stop])
    assert unpacked.is_contiguous()


@pytest.mark.parametrize("bits", WIDTHS)
def test_value_k_stands_at_stream_bits_k_times_bits(bits: int) -> None:
    codes = random_codes(3, 63, bits)
    for row, packed in zip(codes.tolist(), pack_bits(codes, bits).tolist(), strict=True):
        assert int.from_bytes(bytes(packed), "little") == sum(code << bits * k for k, code in enumerate(row))


@pytest.mark.parametrize("bits", WIDTHS)
def test_codes_are_found_at_any_places_in_any_order(bits: int) -> None:
    codes = random_codes(5, 63, bits)
    places = torch.randperm(63, generator=torch.Generator().manual_seed(1)).int()
    assert torch.equal(bitpack.unpack_bits_at(pack_bits(codes, bits), bits, places), codes[:, places])


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decoding_reads_the_numbers_of_a_table(bits: int, dtype: torch.dtype) -> None:
    codes = random_codes(7, 60, bits)
    table = tuple((torch.arange(2**bits, dtype=torch.float32) * 0.3 - 1).tolist())
    decoded = bitpack.decode_bits(pack_bits(codes, bits), bits, slice(5, 59), table, dtype)
    assert torch.equal(decoded, torch.tensor(table, dtype=dtype)[codes[:, 5:59].long()])


def test_packing_works_on_transposed_codes_and_leaves_them_alone() -> None:
    codes = random_codes(9, 31, 3)
    transposed = codes.T.contiguous().T
    assert torch.equal(pack_bits(transposed, 3), pack_bits(codes, 3))
    assert torch.equal(transposed, codes)


def test_a_matrix_of_several_blocks_packs_like_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = random_codes(17, 63, 3)
    whole = pack_bits(codes, 3)
    monkeypatch.setattr(bitpack, "BLOCK_ELEMENTS", 200)
    assert torch.equal(pack_bits(codes, 3), whole)


BYTES = torch.zeros(2, 8, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("codes", "bits", "error", "said"),
    [
        (BYTES, 5, OptionError, "bits=5, expected one of 1, 2, 3, 4, 8"),
        (BYTES, 0, OptionError, "bits=0"),
        (BYTES.int(), 4, DtypeError, "torch.int32, expected torch.uint8"),
        (BYTES[0], 4, ShapeError, r"\(8,\), expected two dimensions"),
        (BYTES + 16, 4, OptionError, "a code is 16, expected 0 to 15 for 4 bits"),
        (BYTES + 2, 1, OptionError, "a code is 2, expected 0 to 1"),
    ],
)
def test_what_cannot_be_packed_is_refused(
    codes: Tensor, bits: int, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        pack_bits(codes, bits)


@pytest.mark.parametrize(
    ("packed", "columns", "error"),
    [
        (BYTES, slice(0, 17), ShapeError),
        (BYTES, slice(-1, 16), ShapeError),
        (BYTES, slice(0, 16, 2), ShapeError),
        (BYTES.float(), slice(0, 4), DtypeError),
    ],
)
def test_what_cannot_be_unpacked_is_refused(packed: Tensor, columns: slice, error: type[Exception]) -> None:
    with pytest.raises(error):
        unpack_bits(packed, 4, columns)

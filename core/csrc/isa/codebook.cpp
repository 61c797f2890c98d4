// The codebook layout: decoding, products with few rows, and the search for the nearest entries.
#include "../layouts.h"
#include "../widths.h"
#include "modq/fixed.h"

namespace modq {
inline namespace MODQ_ISA {
namespace {

template <int BITS>
struct Codebook final : Decoder {
    const modq_codebook& it;
    Table16 table;  // for up to 4 bits

    explicit Codebook(const modq_codebook& given)
        : Decoder(given.rows, given.columns), it(given), table(given.table, BITS > 4 ? 0 : 1 << BITS) {}

    const uint8_t* row_codes(int64_t row) const { return it.codes + row * it.codes_stride; }

    float scale(int64_t block) const {
        if (!it.scale_codes) return it.scales[block];
        float inner = it.scale_table[it.scale_codes[block]] * it.scales[block / it.nested_block_size];
        return inner + *it.scale_offset;
    }

    void decode(int64_t row, int64_t column, int64_t count, float* to) const override {
        const uint8_t* stream = row_codes(row);
        int64_t at = column, stop = column + count;
        for (int64_t block = (row * columns + at) / it.block_size; at < stop; ++block) {
            int64_t end = (block + 1) * it.block_size - row * columns;
            if (end > stop) end = stop;
            decode_run(stream, at, end, scale(block), to + (at - column));
            at = end;
        }
    }

    void decode_run(const uint8_t* stream, int64_t at, int64_t end, float scale, float* to) const {
        for (; at < end && at % 8; ++at) *to++ = it.table[code<BITS>(stream, at)] * scale;
        if constexpr (BITS <= 4) {
            for (; at + W <= end; at += W, to += W) store(to, table(codes<BITS>(stream + at / 8 * BITS)) * scale);
        }
        for (; at < end; ++at) *to++ = it.table[code<BITS>(stream, at)] * scale;
    }
};

// How 4 W bytes of 4-bit indices become entries of the table in fixed point: low nibbles first, and of each
// 16 bytes the first eight first.
struct Chunk {
    static constexpr int columns = 8 * W, bytes = 4 * W, reads = 4 * W, vectors = 4, sums = 1;
    static constexpr int sum_of[] = {0, 0, 0, 0};
    static constexpr float scale = 1;
    B low, high;  // the bytes of the entries
    float unit;

    static int column(int vector, int lane) { return 2 * (lane / 8 * 16 + vector % 2 * 8 + lane % 8) + vector / 2; }

    explicit Chunk(const float* table) {
        float largest = 0;
        for (int i = 0; i < 16; ++i) largest = __builtin_fmaxf(largest, __builtin_fabsf(table[i]));
        // A lane sums eight products with numbers below 2^15: together they stay below 2^31.
        unit = largest > 0 ? largest / 8191 : 1;
        alignas(64) uint8_t lows[4 * W], highs[4 * W];
        for (int i = 0; i < 4 * W; ++i) {
            int16_t entry = (int16_t)__builtin_rintf(table[i % 16] / unit);
            lows[i] = (uint8_t)entry;
            highs[i] = (uint8_t)((uint16_t)entry >> 8);
        }
        low = load<B>(lows);
        high = load<B>(highs);
    }

    void unpack(const uint8_t* from, H* to) const {
        using UH = uint16_t __attribute__((vector_size(4 * W)));
        B raw = load<B>(from), first = raw & 15, second = (B)((UH)raw >> 4) & 15;
        B bytes = pick(low, first), tops = pick(high, first);
        to[0] = pair_low(bytes, tops);
        to[1] = pair_high(bytes, tops);
        bytes = pick(low, second), tops = pick(high, second);
        to[2] = pair_low(bytes, tops);
        to[3] = pair_high(bytes, tops);
    }

    static F combine(const I* sums) { return to_float(sums[0]); }
};

bool fits(const Codebook<4>& w) {
    int64_t b = w.it.block_size;
    return b >= 32 && (b % Chunk::columns == 0 || Chunk::columns % b == 0) && w.columns % b == 0;
}

// The scale of each unit of a row of weights, times the unit of the table.
void read_scales(const Codebook<4>& w, int64_t blocks, int64_t per_block, int64_t row, float unit, float* to) {
    const int64_t first = row * blocks;
    if (!w.it.scale_codes) {
        for (int64_t b = 0; b < blocks; ++b) to[b] = w.it.scales[first + b] * unit;
    }
    for (int64_t b = 0; w.it.scale_codes && b < blocks;) {
        const int64_t nested = (first + b) / w.it.nested_block_size;
        int64_t end = (nested + 1) * w.it.nested_block_size - first;
        if (end > blocks) end = blocks;
        const float inner = w.it.scales[nested] * unit, offset = *w.it.scale_offset * unit;
        for (; b + W <= end; b += W) {
            float entries[W];  // one by one: on the machine that this was measured on, a gather is slower
            for (int64_t i = 0; i < W; ++i) entries[i] = w.it.scale_table[w.it.scale_codes[first + b + i]];
            store(to + b, fma(load<F>(entries), all(inner), all(offset)));
        }
        for (; b < end; ++b) to[b] = w.it.scale_table[w.it.scale_codes[first + b]] * inner + offset;
    }
    for (int64_t u = blocks * per_block - 1; per_block > 1 && u >= 0; --u) to[u] = to[u / per_block];
}

Status few_rows(const Codebook<4>& w, Matrix x, int64_t m, Matrix y) {
    const Chunk chunk(w.it.table);
    const int64_t columns = Chunk::columns, unit = w.it.block_size < columns ? w.it.block_size : columns;
    const Fixed form{columns, columns, unit, w.columns};
    const int64_t bytes = (w.columns + 1) / 2, blocks = w.columns / w.it.block_size;
    const int64_t per_block = w.it.block_size / form.unit;
    auto codes = [&](int64_t row) { return Codes{w.row_codes(row), bytes, w.row_codes(w.rows - 1) + bytes}; };
    return fixed_forward(chunk, form, w.rows, x, m, y, form.units + W, codes, [&](int64_t row, float* space) {
        read_scales(w, blocks, per_block, row, chunk.unit, space);
        return Units{space, nullptr};
    });
}

template <int BITS>
Status product(const modq_codebook& it, Matrix x, int64_t m, Matrix y, bool transpose) {
    Codebook<BITS> w(it);
    if (transpose) return transposed(w, x, m, y);
    if constexpr (BITS == 4)
        if (x.dtype != float32 && fits(w)) return few_rows(w, x, m, y);
    return forward(w, x, m, y);
}

// NaN wins, so that it is seen in the scale.
float larger(float largest, float v) {
    float size = __builtin_fabsf(v);
    return size <= largest || largest != largest ? largest : size;
}

// Where `count` numbers stand among sorted entries that are parted at `borders`; on a border, below it.
void places_of(const float* borders, int64_t entries, const float* numbers, float unit, int64_t count, int32_t* to) {
    if (entries <= 16) {  // so few that counting the borders below is faster than searching
        for (int64_t i = 0; i < count; i += W) {
            F v = load<F>(numbers + i) * unit;
            I place{};
            for (int64_t b = 0; b < entries - 1; ++b) place -= v > borders[b];
            store(to + i, place);
        }
        return;
    }
    for (int64_t i = 0; i < count; ++i) {
        int64_t low = 0;
        for (int64_t step = entries / 2; step; step /= 2) low += borders[low + step - 1] < numbers[i] * unit ? step : 0;
        to[i] = (int32_t)low;
    }
}

void encode_block(const modq_search& it, const float* from, int64_t count, uint8_t* codes, float* scale) {
    float largest = 0;
    for (int64_t i = 0; i < count; ++i) largest = larger(largest, from[i]);
    *scale = largest;
    // A block of zeros stays zeros when divided by the least normal number.
    const float unit = 1 / (largest > 0x1p-126f ? largest : 0x1p-126f);
    constexpr int64_t kPart = 64;
    for (int64_t start = 0; start < count; start += kPart) {
        const int64_t n = count - start < kPart ? count - start : kPart;
        float part[kPart] = {};
        int32_t places[kPart];
        std::memcpy(part, from + start, sizeof(float) * n);
        places_of(it.borders, it.entries, part, unit, kPart, places);
        for (int64_t i = 0; i < n; ++i) codes[start + i] = it.code_of[places[i]];
    }
}

}  // namespace

Status codebook_product(const modq_codebook& it, const Strided& x, int64_t m, const Strided& y, bool transpose) {
    return for_bits(it.bits, [&](auto bits) { return product<decltype(bits)::value>(it, x, m, y, transpose); });
}

Status codebook_dequantize(
    const modq_codebook& it, int64_t row0, int64_t row1, int64_t column0, int64_t column1, const Strided& to
) {
    return for_bits(it.bits, [&](auto bits) {
        return dequantize(Codebook<decltype(bits)::value>(it), row0, row1, column0, column1, to);
    });
}

Status codebook_encode(const modq_search& it, const float* run, int64_t count, uint8_t* codes, float* scales) {
    const int64_t size = it.block_size;
    parallel_for(0, (count + size - 1) / size, 1 + 16384 / size, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
            int64_t start = block * size, n = count - start < size ? count - start : size;
            encode_block(it, run + start, n, codes + start, scales + block);
        }
    });
    return done;
}

}  // namespace MODQ_ISA
}  // namespace modq

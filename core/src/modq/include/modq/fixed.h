// Rows of x as 15-bit integers with a scale for each block of columns, to multiply by integer codes exactly.
//
// Half precision has 8 or 11 significant bits; with 15 below the largest number of a block of at most 256, the
// product loses nothing that the rounding of x or of y had left: an order less than a product of bfloat16
// weights loses, and the sums are exact. One instruction multiplies and adds twice as many of these as of
// float32, in every instruction set, and unpacked codes need no conversion. float32 has more bits than that
// and goes another way.
#pragma once

#include "modq/product.h"

namespace modq {
inline namespace MODQ_ISA {

struct Fixed {
    int64_t chunk;    // columns of a chunk: what one load of codes holds
    int64_t block;    // columns with one scale of x: whole chunks
    int64_t unit;     // columns with one scale of the weights; divides a chunk or is a block
    int64_t columns;
    int64_t chunks, blocks, units;  // how many there are

    Fixed(int64_t chunk, int64_t block, int64_t unit, int64_t columns)
        : chunk(chunk), block(block), unit(unit), columns(columns), chunks((columns + chunk - 1) / chunk),
          blocks((columns + block - 1) / block), units(blocks * (block / unit)) {}
};

// The numbers of m rows of x: values in the order in which a chunk is unpacked, a scale for each block, and
// the sum of the values times the scale for each unit.
struct FixedRows {
    Fixed form;
    Scratch<int16_t> values;
    Scratch<float> scales, sums;

    FixedRows(Fixed form, int64_t m)
        : form(form), values(m * form.chunks * form.chunk), scales(m * form.blocks), sums(m * (form.units + W)) {}
    explicit operator bool() const { return values && scales && sums; }
    const int16_t* row(int64_t i) const { return values.data() + i * form.chunks * form.chunk; }
    const float* row_scales(int64_t i) const { return scales.data() + i * form.blocks; }
    const float* row_sums(int64_t i) const { return sums.data() + i * (form.units + W); }

    // order[place in an unpacked chunk] = column in the chunk
    void fill(Matrix x, int64_t m, const int16_t* order) const {
        parallel_for(0, m, 1 + (1 << 14) / form.columns, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i)
                for (int64_t b = 0; b < form.blocks; ++b) fill_block(x, i, b, order);
        });
    }

  private:
    void fill_block(Matrix x, int64_t i, int64_t b, const int16_t* order) const {
        alignas(64) float numbers[256 + W];
        int64_t start = b * form.block;
        int64_t count = form.columns - start < form.block ? form.columns - start : form.block;
        int64_t chunks = (count + form.chunk - 1) / form.chunk;
        std::memset(numbers, 0, sizeof numbers);
        x.read(i, start, count, numbers);
        float scale = scale_of(numbers, chunks * form.chunk);
        for (int64_t k = 0; k < chunks * form.chunk; k += W) {
            // Adding and taking away 1.5 * 2^23 leaves the nearest integer.
            F rounded = (scale > 0) ? load<F>(numbers + k) / all(scale) + 12582912.0f - 12582912.0f : F{};
            store(numbers + k, rounded);
        }
        scales.data()[i * form.blocks + b] = scale;
        float* sum_of = sums.data() + i * (form.units + W) + b * (form.block / form.unit);
        for (int64_t k = 0; k < chunks * form.chunk; k += form.unit) {
            F total{};  // whole numbers below 2^24: exact
            for (int64_t j = k; j < k + form.unit && j < chunks * form.chunk; j += W) total += load<F>(numbers + j);
            sum_of[k / form.unit] = sum(total) * scale;
        }
        int16_t* to = values.data() + i * form.chunks * form.chunk + start;
        for (int64_t k = 0; k < chunks * form.chunk; k += form.chunk)
            for (int64_t j = 0; j < form.chunk; ++j) to[k + j] = (int16_t)numbers[k + order[j]];
    }

    // The largest magnitude over 32767; NaN if a number is not finite, so that the product is NaN too.
    static float scale_of(const float* numbers, int64_t count) {
        F largest{}, nothing{};
        for (int64_t k = 0; k < count; k += W) {
            F v = load<F>(numbers + k);
            F size = (F)((U)v & 0x7fffffff);
            largest = size > largest ? size : largest;
            nothing += v * 0.0f;
        }
        float found = sum(nothing);
        for (int j = 0; j < W; ++j) found = largest[j] > found ? largest[j] : found;
        if (found != found) return found;
        // Below this the quotient would not be a normal number; what is lost is far below any rounding.
        return found < 1e-33f ? 0.0f : found / 32767.0f;
    }
};

// How many bytes before their use codes are asked for. Rows lie one after the other, but the hardware that would see that
// stops at the end of a page.
constexpr int64_t kAhead = 2048;

constexpr int64_t kRows = 16;  // rows of weights whose codes stay in the cache for all rows of x

// y = x Wᵀ, row by row of W: work(row, space, to, stride) sets to[i * stride] for each row i of x. `space` are
// `numbers` floats that are zero at first and then what the last row left.
template <class Work>
Status by_rows(int64_t rows, int64_t m, int64_t numbers, Matrix y, Work work) {
    Status status = done;
    parallel_shares((rows + kRows - 1) / kRows, 2, [&](auto next_share) {
        Scratch<float> space(numbers), lines(m * kRows);
        if (!space || !lines) {
            __atomic_store_n(&status, out_of_memory, __ATOMIC_RELAXED);
            return;
        }
        for (int64_t block, end; next_share(&block, &end);) {
            for (; block < end; ++block) {
                int64_t row = block * kRows, stop = row + kRows < rows ? row + kRows : rows;
                for (int64_t r = row; r < stop; ++r) work(r, space.data(), lines.data() + (r - row), kRows);
                for (int64_t i = 0; i < m; ++i) y.write(i, row, stop - row, lines.data() + i * kRows);
            }
        }
    });
    return status;
}

// Calls work(first, count) for rows 0 to m - 1 in groups of four, of two and of one; `count` is a constant. MOST is 2
// where four at once do not fit the registers.
template <int MOST = 4, class Work>
void in_groups(int64_t m, Work work) {
    int64_t i = 0;
    if constexpr (MOST == 4)
        for (; i + 4 <= m; i += 4) work(i, std::integral_constant<int, 4>{});
    for (; i + 2 <= m; i += 2) work(i, std::integral_constant<int, 2>{});
    if (i < m) work(i, std::integral_constant<int, 1>{});
}

// How chunks of codes become lanes of 16 bits is a type C with
//     columns, bytes        what a chunk holds
//     reads                 how many bytes `unpack` reads, at least `bytes`
//     vectors               how many vectors it becomes
//     sums, sum_of[vector]  how many sums the products go to, and which one
//     column(vector, lane)  the column of the chunk that a lane holds
//     unpack(from, to)      unpacks
//     combine(sums), scale  one float a lane out of the sums, and a constant that it is to be multiplied by

// The codes of a row of weights, in a tensor that ends at `end`.
struct Codes {
    const uint8_t* at;
    int64_t bytes;
    const uint8_t* end;
};

// The numbers of a row of weights, one for each unit; beyond the last one, zeros. Without `shifts` they are zero.
struct Units {
    float *scales, *shifts;
};

// Adds the products of a chunk and what lies at `at` in M rows of x.
template <int M, class C>
MODQ_INLINE inline void add_chunk(
    const C& chunk, const uint8_t* from, const int16_t* const (&values)[M], int64_t at, I (&sums)[M][C::sums]
) {
    H lanes[C::vectors];
    chunk.unpack(from, lanes);
    unrolled<C::vectors>([&](auto v) MODQ_INLINE {
        unrolled<M>([&](auto i) MODQ_INLINE {
            I& to = sums[i][C::sum_of[v]];
            to = madd_to(to, lanes[v], load<H>(values[i] + at + v * 2 * W));
        });
    });
}

// The scale of each lane of a block of weights, which has so many chunks and units.
struct LaneScales {
    int64_t chunks, units;
    I spread;

    explicit LaneScales(const Fixed& form) : chunks(form.block / form.chunk), units(form.block / form.unit) {
        for (int i = 0; i < W; ++i) spread[i] = i * units / W;
    }
    F operator()(const float* scales, int64_t block) const {
        return units > 1 ? permute(load<F>(scales + block * units), spread) : all(scales[block]);
    }
};

// M rows of x: their values and the scale of each block.
template <int M>
struct Rows {
    const int16_t* values[M];
    const float* scales[M];

    Rows(const FixedRows& x, int64_t first) {
        for (int i = 0; i < M; ++i) values[i] = x.row(first + i), scales[i] = x.row_scales(first + i);
    }
};

// Adds the product of block `b` of a row of weights, whose scales are `units`, to the totals.
template <int M, class C>
MODQ_INLINE inline void add_block(
    const I (&sums)[M][C::sums], const float* const (&scales)[M], int64_t b, const LaneScales& lane_scales,
    const float* units, F (&totals)[M]
) {
    const F scale = lane_scales(units, b);
    unrolled<M>([&](auto i) MODQ_INLINE { totals[i] = fma(C::combine(sums[i]) * scales[i][b], scale, totals[i]); });
}

// The first `blocks` blocks of PER chunks each, without a test for each chunk.
template <int PER, int M, class C>
void add_whole_blocks(
    const C& chunk, const uint8_t* codes, const Rows<M> x, const LaneScales lane_scales, const float* units,
    int64_t blocks, F (&to)[M]
) {  // by value where it is read in the loop: then nothing else can change it
    F totals[M] = {};
    for (int64_t b = 0; b < blocks; ++b, codes += PER * C::bytes) {
        I sums[M][C::sums] = {};
        unrolled<PER>([&](auto p) MODQ_INLINE {
            constexpr int at = p * C::bytes, before = at - C::bytes;
            if (p == 0 || at / 64 > before / 64) __builtin_prefetch(codes + at + kAhead);  // a new cache line
            add_chunk(chunk, codes + at, x.values, (b * PER + p) * C::columns, sums);
        });
        add_block<M, C>(sums, x.scales, b, lane_scales, units, totals);
    }
    for (int i = 0; i < M; ++i) to[i] = totals[i];
}

// to[i * to_stride] = the product of a row of weights and M rows of x from `first` on.
template <int M, class C>
void fixed_row(
    const C& chunk, const FixedRows& x, int64_t first, const LaneScales& lane_scales, Codes codes, Units units, float* to,
    int64_t to_stride
) {
    const Fixed& form = x.form;
    const int64_t chunks = form.chunks, per_block = lane_scales.chunks;
    // The last chunk may reach beyond the row, and what is read of the one before it beyond the tensor: these are
    // read from a copy.
    int64_t whole = codes.bytes / C::bytes;
    if (whole && codes.at + (whole - 1) * C::bytes + C::reads > codes.end) --whole;
    uint8_t rest[C::bytes + C::reads] = {};
    if (whole < chunks) std::memcpy(rest, codes.at + whole * C::bytes, codes.bytes - whole * C::bytes);
    const Rows<M> rows(x, first);
    F totals[M] = {};
    int64_t b = 0;
    auto add_whole = [&](auto per) {
        b = whole / per;
        add_whole_blocks<per>(chunk, codes.at, rows, lane_scales, units.scales, b, totals);
    };
    if (per_block == 1) add_whole(std::integral_constant<int, 1>{});
    else if (per_block == 2) add_whole(std::integral_constant<int, 2>{});
    else if (per_block == 4) add_whole(std::integral_constant<int, 4>{});
    for (int64_t c = b * per_block; c < chunks; ++b) {
        I sums[M][C::sums] = {};
        for (int64_t stop = c + per_block < chunks ? c + per_block : chunks; c < stop; ++c) {
            const uint8_t* from = c < whole ? codes.at + c * C::bytes : rest + (c - whole) * C::bytes;
            add_chunk(chunk, from, rows.values, c * C::columns, sums);
        }
        add_block<M, C>(sums, rows.scales, b, lane_scales, units.scales, totals);
    }
    for (int i = 0; i < M; ++i) {
        F shift{};
        for (int64_t u = 0; units.shifts && u < form.units; u += W)
            shift = fma(load<F>(units.shifts + u), load<F>(x.row_sums(first + i) + u), shift);
        to[i * to_stride] = sum(fma(totals[i], all(C::scale), -shift));
    }
}

// y = x Wᵀ for m rows of x. `codes(row)` gives the Codes of a row, and `read(row, space)` its Units, for which it
// has `numbers` floats that are zero at first and then what the last row left.
template <class C, class CodesOf, class Read>
Status fixed_forward(
    const C& chunk, const Fixed& form, int64_t rows, Matrix x, int64_t m, Matrix y, int64_t numbers, CodesOf codes,
    Read read
) {
    FixedRows values(form, m);
    if (!values) return out_of_memory;
    const LaneScales lane_scales(form);
    int16_t order[C::columns];
    for (int v = 0; v < C::vectors; ++v)
        for (int lane = 0; lane < 2 * W; ++lane) order[v * 2 * W + lane] = (int16_t)C::column(v, lane);
    values.fill(x, m, order);
    return by_rows(rows, m, numbers, y, [&](int64_t row, float* space, float* to, int64_t stride) {
        const Codes its = codes(row);
        const Units units = read(row, space);
        in_groups<(C::sums < 4 ? 4 : 2)>(m, [&](int64_t i, auto count) {
            fixed_row<count>(chunk, values, i, lane_scales, its, units, to + i * stride, stride);
        });
    });
}

}  // namespace MODQ_ISA
}  // namespace modq

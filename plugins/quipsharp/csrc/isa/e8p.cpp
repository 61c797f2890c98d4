// E8P codes: decoding, and products with few rows. Points are held times four, as int8: the plugin's unit.
#include "../e8p.h"
#include "modq/fixed.h"

namespace modq {
inline namespace MODQ_ISA {
namespace {

using F8 = float __attribute__((vector_size(32)));

struct Stream {
    const uint8_t* codes;
    int64_t stride;
    const uint8_t* row(int64_t i) const { return codes + i * stride; }
};

// Codes of 16 bits: two tables of 2 KiB, which stay in the first-level cache.
struct Lattice : Stream {
    static constexpr int bytes = 2;
    const uint64_t *rows, *signs;
    uint64_t run(uint64_t code) const { return rows[code >> 8 & 255] ^ signs[code & 255]; }
};

// Codes of 8 bits: E81B, the second stage at 3 bits.
struct Fine : Stream {
    static constexpr int bytes = 1;
    const uint64_t* points;
    uint64_t run(uint64_t code) const { return points[code & 255]; }
};

struct Nothing : Stream {
    static constexpr int bytes = 0;
    uint64_t run(uint64_t) const { return 0; }
};

template <class Stage>
uint64_t run_at(const Stage& stage, const uint8_t* row, int64_t place) {
    return stage.run(word<Stage::bytes>(row + place * Stage::bytes));
}

inline F8 to_floats(uint64_t run) {
#if defined(__AVX2__)
    return (F8)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((int64_t)run)));
#else
    F8 values;
    for (int i = 0; i < 8; ++i) values[i] = (int8_t)(run >> 8 * i);
    return values;
#endif
}

// A matrix of points, each of them of a first stage and of a finer one.
template <class Second>
struct Points final : Decoder {
    Lattice first;
    Second second;
    float finer;

    Points(const modq_e8p& it, Second second)
        : Decoder(it.rows, it.columns), first{{it.codes, it.codes_stride}, it.row_table, it.sign_table},
          second(second), finer(it.finer) {}

    F8 floats(int64_t row, int64_t place) const {
        F8 values = to_floats(run_at(first, first.row(row), place));
        if constexpr (Second::bytes > 0) values += to_floats(run_at(second, second.row(row), place)) * finer;
        return values;
    }

    void decode(int64_t row, int64_t column, int64_t count, float* to) const override {
        int64_t at = column, stop = column + count;
        for (; at < stop && (at % 8 || stop - at < 8); ++at) *to++ = floats(row, at / 8)[at % 8];
        for (; at + 8 <= stop; at += 8, to += 8) store(to, floats(row, at / 8));
        for (; at < stop; ++at) *to++ = floats(row, at / 8)[at % 8];
    }
};

constexpr int64_t kColumns = 32;           // of a chunk: four runs
constexpr int kVectors = kColumns / (2 * W);  // of 16 bits
constexpr int64_t kBlock = 256;            // columns with one scale of x

using Runs = uint64_t __attribute__((vector_size(2 * W)));
constexpr int kRuns = W / 4;  // of a vector

inline H widen(Runs held) {
#if defined(__AVX512BW__)
    return (H)_mm512_cvtepi8_epi16((__m256i)held);
#elif defined(__AVX2__)
    return (H)_mm256_cvtepi8_epi16((__m128i)held);
#else
    using Signed = int8_t __attribute__((vector_size(2 * W)));
    return __builtin_convertvector((Signed)held, H);
#endif
}

// Two numbers of a table in one register, by one instruction each: compilers take three for both.
inline Runs look_up(const uint64_t* table, const uint64_t* places) {
#if defined(__x86_64__)
    Runs found;
    __m128d pairs[kRuns / 2];
    for (int i = 0; i < kRuns / 2; ++i) {
        pairs[i] = _mm_load_sd(reinterpret_cast<const double*>(table + places[2 * i]));
        pairs[i] = _mm_loadh_pd(pairs[i], reinterpret_cast<const double*>(table + places[2 * i + 1]));
    }
    std::memcpy(&found, pairs, sizeof found);
    return found;
#else
    Runs found;
    for (int i = 0; i < kRuns; ++i) found[i] = table[places[i]];
    return found;
#endif
}

// The next runs of a vector as 16 bits.
inline H unpack(const Lattice& stage, const uint8_t* from) {
    uint64_t rows[kRuns], signs[kRuns];
    unrolled<kRuns>([&](auto i) { signs[i] = from[2 * i], rows[i] = from[2 * i + 1]; });
    return widen(look_up(stage.rows, rows) ^ look_up(stage.signs, signs));
}

inline H unpack(const Fine& stage, const uint8_t* from) {
    uint64_t places[kRuns];
    unrolled<kRuns>([&](auto i) { places[i] = from[i]; });
    return widen(look_up(stage.points, places));
}

// Where the codes of a row lie. The last chunk may reach beyond the row: it is read from a copy.
template <class Stage>
struct RowCodes {
    static constexpr int bytes = kColumns / 8 * Stage::bytes;
    const uint8_t* stream;
    uint8_t rest[8] = {};

    RowCodes(const Stage& stage, int64_t row, int64_t columns) : stream(stage.row(row)) {
        const int64_t left = columns % kColumns / 8 * Stage::bytes;
        if (left) std::memcpy(rest, stream + columns / kColumns * bytes, left);
    }
};

// The part of row `row` of y = x Wᵀ for M rows of x. A lane sums less than 2^31 over a block: 11 · 2^15 · 32.
template <int M, class Second>
void one_row(const Points<Second>& w, const FixedRows& x, int64_t first, int64_t row, float* to, int64_t to_stride) {
    constexpr bool two = Second::bytes > 0;
    const RowCodes<Lattice> codes(w.first, row, w.columns);
    const RowCodes<Second> residual(w.second, row, w.columns);
    const int64_t whole = w.columns / kColumns * kColumns, width = x.form.chunks * kColumns;
    const int16_t* values[M];
    const float* scales[M];
    F totals[M];
    for (int i = 0; i < M; ++i) {
        values[i] = x.row(first + i);
        scales[i] = x.row_scales(first + i);
        totals[i] = F{};
    }
    const uint8_t *from = codes.stream, *finer_from = residual.stream;
    for (int64_t b = 0, at = 0; at < width; ++b) {
        I sums[M] = {}, finer[M] = {};
        const int64_t end = at + kBlock < width ? at + kBlock : width;
        while (at < end) {
            if (at == whole) from = codes.rest, finer_from = residual.rest;
            const int64_t stop = at < whole && whole < end ? whole : end;
            for (; at < stop; at += kColumns, from += codes.bytes, finer_from += residual.bytes)
                unrolled<kVectors>([&](auto v) {
                    const int64_t run = v * kRuns, start = at + v * 2 * W;
                    const H lanes = unpack(w.first, from + run * Lattice::bytes);
                    unrolled<M>([&](auto i) { sums[i] = madd_to(sums[i], lanes, load<H>(values[i] + start)); });
                    if constexpr (two) {
                        const H fine = unpack(w.second, finer_from + run * Second::bytes);
                        unrolled<M>([&](auto i) { finer[i] = madd_to(finer[i], fine, load<H>(values[i] + start)); });
                    }
                });
        }
        unrolled<M>([&](auto i) {
            F found = to_float(sums[i]);
            if constexpr (two) found = fma(to_float(finer[i]), all(w.finer), found);
            totals[i] = fma(found, all(scales[i][b]), totals[i]);
        });
    }
    for (int i = 0; i < M; ++i) to[i * to_stride] = sum(totals[i]);
}

template <class Second>
Status few_rows(const Points<Second>& w, Matrix x, int64_t m, Matrix y) {
    FixedRows rows({kColumns, kBlock, kBlock, w.columns}, m);
    if (!rows) return out_of_memory;
    int16_t order[kColumns];
    for (int64_t i = 0; i < kColumns; ++i) order[i] = (int16_t)i;
    rows.fill(x, m, order);
    return by_rows(w.rows, m, 1, y, [&](int64_t row, float*, float* to, int64_t stride) {
        in_groups(m, [&](int64_t i, auto count) { one_row<count>(w, rows, i, row, to + i * stride, stride); });
    });
}

template <class Work>
Status with_points(const modq_e8p& it, Work work) {
    switch (it.bits) {
        case 2: return work(Points<Nothing>(it, {}));
        case 3: return work(Points<Fine>(it, {{it.residual, it.residual_stride}, it.fine_table}));
        case 4: return work(Points<Lattice>(it, {{it.residual, it.residual_stride}, it.row_table, it.sign_table}));
        default: return not_covered;
    }
}

}  // namespace

Status e8p_product(const modq_e8p& it, const Strided& x, int64_t m, const Strided& y, bool transpose) {
    return with_points(it, [&](const auto& w) {
        if (transpose) return transposed(w, x, m, y);
        return it.half ? few_rows(w, x, m, y) : forward(w, x, m, y);
    });
}

Status e8p_dequantize(
    const modq_e8p& it, int64_t row0, int64_t row1, int64_t column0, int64_t column1, const Strided& to
) {
    return with_points(it, [&](const auto& w) { return dequantize(w, row0, row1, column0, column1, to); });
}

}  // namespace MODQ_ISA
}  // namespace modq

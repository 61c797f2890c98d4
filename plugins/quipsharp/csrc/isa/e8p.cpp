// E8P codes: decoding, and products with few rows. Points are held times four, as int16: the plugin's unit.
#include "../e8p.h"
#include "modq/fixed.h"

namespace modq {
inline namespace MODQ_ISA {
namespace {

using F8 = float __attribute__((vector_size(32)));
using Run = int16_t __attribute__((vector_size(16)));  // eight numbers

struct Stream {
    const uint8_t* codes;
    int64_t stride;
    const uint8_t* row(int64_t i) const { return codes + i * stride; }
};

// The entry of a table that byte number BYTE of `codes` names. A rotation and a mask give how many bytes on it lies, one
// instruction less than a shift, a mask and a scale.
template <int BYTE>
inline Run entry(const int16_t* table, uint64_t codes) {
    constexpr int by = (8 * BYTE + 60) % 64;
    const uint64_t bytes = (codes >> by | codes << (64 - by)) & 0xff0;
    return load<Run>(reinterpret_cast<const char*>(table) + bytes);
}

// Codes of 16 bits: two tables of 4 KiB, which stay in the first-level cache.
struct Lattice : Stream {
    static constexpr int bytes = 2;
    const int16_t *rows, *signs;
    template <int PLACE>
    Run run(uint64_t codes) const {
        return entry<2 * PLACE + 1>(rows, codes) ^ entry<2 * PLACE>(signs, codes);
    }
};

// Codes of 8 bits: E81B, the second stage at 3 bits.
struct Fine : Stream {
    static constexpr int bytes = 1;
    const int16_t* points;
    template <int PLACE>
    Run run(uint64_t codes) const {
        return entry<PLACE>(points, codes);
    }
};

struct Nothing : Stream {
    static constexpr int bytes = 0;
    template <int PLACE>
    Run run(uint64_t) const {
        return Run{};
    }
};

template <class Stage>
Run run_at(const Stage& stage, const uint8_t* row, int64_t place) {
    return stage.template run<0>(word<Stage::bytes>(row + place * Stage::bytes));
}

inline F8 to_floats(Run run) {
#if defined(__AVX2__)
    return (F8)_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32((__m128i)run));
#else
    F8 values;
    for (int i = 0; i < 8; ++i) values[i] = run[i];
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

constexpr int kRuns = W / 4;  // of a vector

// The runs of a vector, one after the other.
inline H join(const Run* runs) {
#if defined(__AVX512BW__)
    __m512i v = _mm512_castsi128_si512((__m128i)runs[0]);
    v = _mm512_inserti32x4(v, (__m128i)runs[1], 1);
    v = _mm512_inserti32x4(v, (__m128i)runs[2], 2);
    return (H)_mm512_inserti32x4(v, (__m128i)runs[3], 3);
#elif defined(__AVX2__)
    return (H)_mm256_inserti128_si256(_mm256_castsi128_si256((__m128i)runs[0]), (__m128i)runs[1], 1);
#else
    return load<H>(runs);
#endif
}

// The runs of a chunk. Their codes are read at once: to read them one by one would take as long as all else.
template <class Stage>
inline void unpack(const Stage& stage, const uint8_t* from, H (&to)[kVectors]) {
    uint64_t codes = 0;
    std::memcpy(&codes, from, kColumns / 8 * Stage::bytes);
    Run runs[kColumns / 8];
    unrolled<kColumns / 8>([&](auto i) MODQ_INLINE { runs[i] = stage.template run<i>(codes); });
    unrolled<kVectors>([&](auto v) MODQ_INLINE { to[v] = join(runs + v * kRuns); });
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
    const Lattice lattice = w.first;  // copies, which nothing that is written can change
    const Second finer_stage = w.second;
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
            for (; at < stop; at += kColumns, from += codes.bytes, finer_from += residual.bytes) {
                H lanes[kVectors], fine[kVectors];
                unpack(lattice, from, lanes);
                if constexpr (two) unpack(finer_stage, finer_from, fine);
                unrolled<kVectors>([&](auto v) MODQ_INLINE {
                    unrolled<M>([&](auto i) MODQ_INLINE {
                        const H held = load<H>(values[i] + at + v * 2 * W);
                        sums[i] = madd_to(sums[i], lanes[v], held);
                        if constexpr (two) finer[i] = madd_to(finer[i], fine[v], held);
                    });
                });
            }
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

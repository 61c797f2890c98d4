// The vector codebook layout: decoding, and products with few rows.
#include "../layouts.h"
#include "modq/fixed.h"

namespace modq {
inline namespace MODQ_ISA {
namespace {

using F8 = float __attribute__((vector_size(32)));

inline F8 fma8(F8 a, F8 b, F8 c) {
#if defined(__FMA__)
    return (F8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

inline float sum8(F8 v) {
    for (int i = 0; i < 4; ++i) v[i] += v[i + 4];
    return (v[0] + v[2]) + (v[1] + v[3]);
}

// Eight numbers of a dtype.
template <DType DTYPE>
inline F8 eight(const void* at) {
    if constexpr (DTYPE == float32) return load<F8>(at);
#if defined(__AVX2__)
    const __m128i halves = load<__m128i>(at);
    if constexpr (DTYPE == bfloat16) return (F8)_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
    else return (F8)_mm256_cvtph_ps(halves);
#else
    return DTYPE == bfloat16 ? from_bfloat16(at) : from_float16(at);  // here W is 8
#endif
}

// Codes are uint8 or uint16. BOOKS codebooks of vectors of eight; 0 for any number of them, and of vectors.
template <class Code, DType DTYPE, int BOOKS>
struct Vectors final : Decoder {
    static constexpr int64_t bytes = DTYPE == float32 ? 4 : 2;
    const modq_vector& it;
    const int64_t mask, book_bytes;

    explicit Vectors(const modq_vector& given)
        : Decoder(given.rows, given.columns), it(given), mask(((int64_t)1 << given.bits) - 1),
          book_bytes((mask + 1) * given.vector_size * bytes) {}

    // Constants where they can be: with them a run takes a third of the time.
    int64_t books() const { return BOOKS ? BOOKS : it.codebooks; }
    int64_t size() const { return BOOKS ? 8 : it.vector_size; }
    const Code* row_codes(int64_t row) const {
        return static_cast<const Code*>(it.codes) + row * (columns / size()) * books();
    }
    float scale(int64_t row) const {
        char numbers[32] = {};
        std::memcpy(numbers, static_cast<const char*>(it.scales) + row * bytes, bytes);
        return eight<DTYPE>(numbers)[0];
    }

    // Columns 8 run to 8 run + 7 of the row with these codes, without its scale.
    F8 run(const Code* codes, int64_t run) const {
        const int64_t vector = 8 * run / size();
        const char* from = static_cast<const char*>(it.tables) + (8 * run - vector * size()) * bytes;
        codes += vector * books();
        F8 values = eight<DTYPE>(from + (codes[0] & mask) * (size() * bytes));
        for (int64_t b = 1; b < books(); ++b)
            values += eight<DTYPE>(from + b * book_bytes + (codes[b] & mask) * (size() * bytes));
        return values;
    }

    void decode(int64_t row, int64_t column, int64_t count, float* to) const override {
        const Code* codes = row_codes(row);
        const float s = scale(row);
        int64_t at = column, stop = column + count;
        for (; at < stop && at % 8; ++at) *to++ = run(codes, at / 8)[at % 8] * s;
        for (; at + 8 <= stop; at += 8, to += 8) store(to, run(codes, at / 8) * s);
        for (; at < stop; ++at) *to++ = run(codes, at / 8)[at % 8] * s;
    }
};

// The part of row `row` of y = x Wᵀ for M rows of x: entries are multiplied as they are read.
template <int M, class Weight>
void one_row(const Weight& w, const float* x, int64_t row, float* to, int64_t to_stride) {
    constexpr int kChains = M < 4 ? 4 / M : 1;  // sums that do not wait for one another
    const auto* codes = w.row_codes(row);
    const int64_t runs = w.columns / 8;
    F8 totals[M] = {};
    for (int64_t r = 0; r < runs;) {
        F8 held[M][kChains] = {};  // a short sum that then joins the long one: it keeps rounding small
        const int64_t stop = r + 32 < runs ? r + 32 : runs;
        for (; r + kChains <= stop; r += kChains)
            unrolled<kChains>([&](auto c) {
                F8 values = w.run(codes, r + c);
                unrolled<M>([&](auto i) {
                    held[i][c] = fma8(values, load<F8>(x + i * w.columns + 8 * (r + c)), held[i][c]);
                });
            });
        for (; r < stop; ++r) {
            F8 values = w.run(codes, r);
            unrolled<M>([&](auto i) { held[i][0] = fma8(values, load<F8>(x + i * w.columns + 8 * r), held[i][0]); });
        }
        unrolled<M>([&](auto i) { unrolled<kChains>([&](auto c) { totals[i] += held[i][c]; }); });
    }
    const float s = w.scale(row);
    for (int i = 0; i < M; ++i) to[i * to_stride] = sum8(totals[i]) * s;
}

template <class Weight>
Status direct_forward(const Weight& w, Matrix x, int64_t m, Matrix y) {
    const int64_t columns = w.columns;
    Scratch<float> numbers(m * columns);
    if (!numbers) return out_of_memory;
    for (int64_t i = 0; i < m; ++i) x.read(i, 0, columns, numbers.data() + i * columns);
    return by_rows(w.rows, m, 1, y, [&](int64_t row, float*, float* to, int64_t stride) {
        in_groups(m, [&](int64_t i, auto count) {
            one_row<count>(w, numbers.data() + i * columns, row, to + i * stride, stride);
        });
    });
}

template <class Code, DType DTYPE, class Work>
Status with_books(const modq_vector& it, Work work) {
    if (it.vector_size == 8 && it.codebooks == 1) return work(Vectors<Code, DTYPE, 1>(it));
    if (it.vector_size == 8 && it.codebooks == 2) return work(Vectors<Code, DTYPE, 2>(it));
    return work(Vectors<Code, DTYPE, 0>(it));
}

template <class Code, class Work>
Status with_dtype(const modq_vector& it, Work work) {
    switch (it.dtype) {
        case float32: return with_books<Code, float32>(it, work);
        case bfloat16: return with_books<Code, bfloat16>(it, work);
        case float16: return with_books<Code, float16>(it, work);
        default: return not_covered;
    }
}

template <class Work>
Status with_vectors(const modq_vector& it, Work work) {
    return it.bits > 8 ? with_dtype<uint16_t>(it, work) : with_dtype<uint8_t>(it, work);
}

constexpr int64_t kDirect = 12;  // rows of x up to which tiles, which are decoded once for all of them, do not pay

}  // namespace

Status vector_product(const modq_vector& it, const Strided& x, int64_t m, const Strided& y, bool transpose) {
    return with_vectors(it, [&](const auto& w) {
        if (transpose) return transposed(w, x, m, y);
        return m <= kDirect ? direct_forward(w, x, m, y) : forward(w, x, m, y);
    });
}

Status vector_dequantize(
    const modq_vector& it, int64_t row0, int64_t row1, int64_t column0, int64_t column1, const Strided& to
) {
    return with_vectors(it, [&](const auto& w) { return dequantize(w, row0, row1, column0, column1, to); });
}

}  // namespace MODQ_ISA
}  // namespace modq

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
    int64_t chunks() const { return (columns + chunk - 1) / chunk; }
    int64_t blocks() const { return (columns + block - 1) / block; }
    int64_t units() const { return blocks() * (block / unit); }
};

// The numbers of m rows of x: values in the order in which a chunk is unpacked, a scale for each block, and
// the sum of the values times the scale for each unit.
struct FixedRows {
    Fixed form;
    Scratch<int16_t> values;
    Scratch<float> scales, sums;

    FixedRows(Fixed form, int64_t m)
        : form(form), values(m * form.chunks() * form.chunk), scales(m * form.blocks()), sums(m * (form.units() + W)) {}
    explicit operator bool() const { return values && scales && sums; }
    const int16_t* row(int64_t i) const { return values.data() + i * form.chunks() * form.chunk; }
    const float* row_scales(int64_t i) const { return scales.data() + i * form.blocks(); }
    const float* row_sums(int64_t i) const { return sums.data() + i * (form.units() + W); }

    // order[place in an unpacked chunk] = column in the chunk
    void fill(Matrix x, int64_t m, const int16_t* order) const {
        parallel_for(0, m, 1 + (1 << 14) / form.columns, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i)
                for (int64_t b = 0; b < form.blocks(); ++b) fill_block(x, i, b, order);
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
        scales.data()[i * form.blocks() + b] = scale;
        float* sum_of = sums.data() + i * (form.units() + W) + b * (form.block / form.unit);
        for (int64_t k = 0; k < chunks * form.chunk; k += form.unit) {
            F total{};  // whole numbers below 2^24: exact
            for (int64_t j = k; j < k + form.unit && j < chunks * form.chunk; j += W) total += load<F>(numbers + j);
            sum_of[k / form.unit] = sum(total) * scale;
        }
        int16_t* to = values.data() + i * form.chunks() * form.chunk + start;
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

constexpr int64_t kRows = 16;  // rows of weights whose codes stay in the cache for all rows of x

// y = x Wᵀ, row by row of W: work(row, space, to, stride) sets to[i * stride] for each row i of x. `space` are
// `numbers` floats that are zero at first and then what the last row left.
template <class Work>
Status by_rows(int64_t rows, int64_t m, int64_t numbers, Matrix y, Work work) {
    Status status = done;
    parallel_for(0, (rows + kRows - 1) / kRows, 2, [&](int64_t begin, int64_t end) {
        Scratch<float> space(numbers), lines(m * kRows);
        if (!space || !lines) {
            __atomic_store_n(&status, out_of_memory, __ATOMIC_RELAXED);
            return;
        }
        for (int64_t block = begin; block < end; ++block) {
            int64_t row = block * kRows, stop = row + kRows < rows ? row + kRows : rows;
            for (int64_t r = row; r < stop; ++r) work(r, space.data(), lines.data() + (r - row), kRows);
            for (int64_t i = 0; i < m; ++i) y.write(i, row, stop - row, lines.data() + i * kRows);
        }
    });
    return status;
}

}  // namespace MODQ_ISA
}  // namespace modq

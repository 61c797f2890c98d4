// Products with, and slices of, a matrix that is known by how its rows are decoded: any layout, either
// direction, float32 arithmetic throughout. For few rows of x; for many, decode slices and use a GEMM.
//
// Tiles of it are decoded into the first-level cache, so that what is decoded is used for all rows of x.
#pragma once

#include "modq/parallel.h"
#include "modq/simd.h"

#include <cstdlib>

namespace modq {
inline namespace MODQ_ISA {

// Memory for the time of a call, aligned to a cache line and zero.
template <class T>
class Scratch {
  public:
    explicit Scratch(int64_t count) {
        size_t bytes = (sizeof(T) * count + 127) / 64 * 64;
        at_ = static_cast<T*>(std::aligned_alloc(64, bytes));
        if (at_) std::memset(static_cast<void*>(at_), 0, bytes);
    }
    ~Scratch() { std::free(at_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    T* data() const { return at_; }
    explicit operator bool() const { return at_ != nullptr; }

  private:
    T* at_;
};

// A matrix whose rows are contiguous, read and written as float32.
struct Matrix {
    void* data;
    DType dtype;
    int64_t stride;

    Matrix(const Strided& it) : data(it.data), dtype(DType(it.dtype)), stride(it.stride) {}

    void read(int64_t row, int64_t column, int64_t count, float* to) const {
        read_floats(data, dtype, row * stride + column, count, to);
    }
    void write(int64_t row, int64_t column, int64_t count, const float* from) const {
        write_floats(data, dtype, row * stride + column, count, from);
    }
};

// A matrix (rows, columns) = (out, in), by how a run of columns of one row is decoded.
struct Decoder {
    int64_t rows, columns;

    Decoder(int64_t rows, int64_t columns) : rows(rows), columns(columns) {}
    virtual ~Decoder() = default;
    virtual void decode(int64_t row, int64_t column, int64_t count, float* to) const = 0;
};

constexpr int64_t kDepth = 256;   // columns of a tile
constexpr int64_t kAtOnce = 32;   // rows of x for which sums are kept

// to[i - row0][j - column0] = W[i][j] of the slice.
inline Status dequantize(const Decoder& w, int64_t row0, int64_t row1, int64_t column0, int64_t column1, Matrix to) {
    int64_t width = column1 - column0;
    if (row1 <= row0 || width <= 0) return done;
    int64_t grain = 1 + (1 << 15) / width;
    parallel_for(row0, row1, grain, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            if (to.dtype == float32) {
                w.decode(row, column0, width, static_cast<float*>(to.data) + (row - row0) * to.stride);
                continue;
            }
            float part[4 * kDepth];
            for (int64_t c = 0; c < width; c += 4 * kDepth) {
                int64_t count = width - c < 4 * kDepth ? width - c : 4 * kDepth;
                w.decode(row, column0 + c, count, part);
                to.write(row - row0, c, count, part);
            }
        }
    });
    return done;
}

// sums[i * W + j] += the product of two rows of x and four of a tile, over `depth` columns, in lanes.
inline void add_products(
    const float* x, int64_t x_stride, int xs, const float* tile, int64_t depth, F* sums, int64_t sums_stride
) {
    F held[2][4] = {};  // a short sum that then joins the long one: it keeps rounding small
    if (xs == 2) {
        for (int64_t k = 0; k < depth; k += W) {
            F x0 = load<F>(x + k), x1 = load<F>(x + x_stride + k);
            for (int j = 0; j < 4; ++j) {
                F t = load<F>(tile + j * kDepth + k);
                held[0][j] = fma(x0, t, held[0][j]);
                held[1][j] = fma(x1, t, held[1][j]);
            }
        }
    } else {
        for (int64_t k = 0; k < depth; k += W) {
            F x0 = load<F>(x + k);
            for (int j = 0; j < 4; ++j) held[0][j] = fma(x0, load<F>(tile + j * kDepth + k), held[0][j]);
        }
    }
    for (int i = 0; i < xs; ++i)
        for (int j = 0; j < 4; ++j) sums[i * sums_stride + j] += held[i][j];
}

// y = x Wᵀ: x (m, columns), y (m, rows).
inline Status forward(const Decoder& w, Matrix x, int64_t m, Matrix y) {
    const int64_t padded = (w.columns + W - 1) / W * W;
    Scratch<float> numbers(m * padded);
    if (!numbers) return out_of_memory;
    parallel_for(0, m, 1 + (1 << 14) / padded, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) x.read(i, 0, w.columns, numbers.data() + i * padded);
    });
    constexpr int R = W;  // rows of W in a tile
    parallel_for(0, (w.rows + R - 1) / R, 4, [&](int64_t begin, int64_t end) {
        alignas(64) float tile[R * kDepth];
        alignas(64) F sums[kAtOnce * R];
        for (int64_t block = begin; block < end; ++block) {
            int64_t row = block * R, rows = w.rows - row < R ? w.rows - row : R;
            if (rows < R) std::memset(tile, 0, sizeof tile);
            for (int64_t first = 0; first < m; first += kAtOnce) {
                int64_t xs = m - first < kAtOnce ? m - first : kAtOnce;
                for (int64_t i = 0; i < xs * R; ++i) sums[i] = F{};
                for (int64_t c = 0; c < w.columns; c += kDepth) {
                    int64_t count = w.columns - c < kDepth ? w.columns - c : kDepth;
                    int64_t depth = (count + W - 1) / W * W;
                    for (int64_t r = 0; r < rows; ++r) {
                        w.decode(row + r, c, count, tile + r * kDepth);
                        for (int64_t k = count; k < depth; ++k) tile[r * kDepth + k] = 0;
                    }
                    for (int64_t i = 0; i < xs; i += 2)
                        for (int64_t r = 0; r < rows; r += 4)
                            add_products(
                                numbers.data() + (first + i) * padded + c, padded, xs - i > 1 ? 2 : 1,
                                tile + r * kDepth, depth, sums + i * R + r, R
                            );
                }
                for (int64_t i = 0; i < xs; ++i) {
                    float line[R];
                    for (int64_t r = 0; r < rows; ++r) line[r] = sum(sums[i * R + r]);
                    y.write(first + i, row, rows, line);
                }
            }
        }
    });
    return done;
}

constexpr int64_t kRun = 256;  // rows of W whose sum joins the total at once

// y = x W: x (m, rows), y (m, columns).
inline Status transposed(const Decoder& w, Matrix x, int64_t m, Matrix y) {
    const int64_t padded = (w.rows + 3) / 4 * 4;
    Scratch<float> numbers(m * padded);
    if (!numbers) return out_of_memory;
    parallel_for(0, m, 1 + (1 << 14) / padded, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) x.read(i, 0, w.rows, numbers.data() + i * padded);
    });
    constexpr int64_t kSums = 16;  // rows of x whose sums fit the first-level cache beside the tile
    parallel_for(0, (w.columns + kDepth - 1) / kDepth, 1, [&](int64_t begin, int64_t end) {
        alignas(64) float tile[4 * kDepth];
        alignas(64) float run[kSums * kDepth];
        alignas(64) float total[kSums * kDepth];
        for (int64_t block = begin; block < end; ++block)
            for (int64_t first = 0; first < m; first += kSums) {
                int64_t xs = m - first < kSums ? m - first : kSums;
                int64_t c = block * kDepth, count = w.columns - c < kDepth ? w.columns - c : kDepth;
                std::memset(total, 0, sizeof total);
                for (int64_t start = 0; start < w.rows; start += kRun) {
                    int64_t stop = w.rows - start < kRun ? w.rows : start + kRun;
                    std::memset(run, 0, sizeof run);
                    for (int64_t row = start; row < stop; row += 4) {
                        for (int64_t r = 0; r < 4; ++r)
                            if (row + r < stop) w.decode(row + r, c, count, tile + r * kDepth);
                            else std::memset(tile + r * kDepth, 0, sizeof(float) * kDepth);
                        for (int64_t i = 0; i < xs; ++i) {
                            const float* g = numbers.data() + (first + i) * padded + row;
                            F g0 = all(g[0]), g1 = all(g[1]), g2 = all(g[2]), g3 = all(g[3]);
                            float* s = run + i * kDepth;
                            for (int64_t k = 0; k < count; k += W) {
                                F v = fma(g0, load<F>(tile + k), load<F>(s + k));
                                v = fma(g1, load<F>(tile + kDepth + k), v);
                                v = fma(g2, load<F>(tile + 2 * kDepth + k), v);
                                store(s + k, fma(g3, load<F>(tile + 3 * kDepth + k), v));
                            }
                        }
                    }
                    for (int64_t i = 0; i < xs * kDepth; i += W)
                        store(total + i, load<F>(total + i) + load<F>(run + i));
                }
                for (int64_t i = 0; i < xs; ++i) y.write(first + i, c, count, total + i * kDepth);
            }
    });
    return done;
}

}  // namespace MODQ_ISA
}  // namespace modq

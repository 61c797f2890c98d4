// The rotations about the codes, with the scales and the conversions beside them, in one pass over each row.
#include "../e8p.h"
#include "modq/product.h"

namespace modq {
inline namespace MODQ_ISA {
namespace {

// Stages 1, 2, ... of the Walsh-Hadamard transform whose halves lie within one vector.
inline F within(F v) {
    for (int half = 1; half < W; half *= 2) {
        I other;
        F sign;
        for (int i = 0; i < W; ++i) other[i] = i ^ half, sign[i] = i & half ? -1.0f : 1.0f;
        v = fma(v, sign, permute(v, other));
    }
    return v;
}

inline void butterfly(float* low, float* high) {
    F a = load<F>(low), b = load<F>(high);
    store(low, a + b);
    store(high, a - b);
}

// Two stages at once, so that memory is read and written half as often.
inline void butterflies(float* at, int64_t half) {
    F a = load<F>(at), b = load<F>(at + half), c = load<F>(at + 2 * half), d = load<F>(at + 3 * half);
    F ab = a + b, cd = c + d, a_b = a - b, c_d = c - d;
    store(at, ab + cd);
    store(at + half, a_b + c_d);
    store(at + 2 * half, ab - cd);
    store(at + 3 * half, a_b - c_d);
}

// The Walsh-Hadamard transform of `size` numbers, a power of two, times √size.
void transform(float* numbers, int64_t size) {
    int64_t half = 1;
    if (size >= W) {
        for (int64_t i = 0; i < size; i += W) store(numbers + i, within(load<F>(numbers + i)));
        half = W;
    } else {
        for (; half < size; half *= 2)
            for (int64_t i = 0; i < size; ++i)
                if (!(i & half)) {
                    float a = numbers[i], b = numbers[i + half];
                    numbers[i] = a + b;
                    numbers[i + half] = a - b;
                }
    }
    for (; 4 * half <= size; half *= 4)
        for (int64_t start = 0; start < size; start += 4 * half)
            for (int64_t i = start; i < start + half; i += W) butterflies(numbers + i, half);
    for (; half < size; half *= 2)
        for (int64_t start = 0; start < size; start += 2 * half)
            for (int64_t i = start; i < start + half; i += W) butterfly(numbers + i, numbers + i + half);
}

// to[i] = Σ first[i][j] from[j] for lines of `size` numbers; with `transpose`, first[j][i]. COLUMNS vectors of a line,
// and LINES of the lines from i on.
template <int LINES, int COLUMNS>
inline void mix(const modq_turn& it, bool transpose, int64_t i, int64_t size, const float* from, float* to) {
    F sums[LINES][COLUMNS] = {};
    const int64_t down = transpose ? 1 : it.k, right = transpose ? it.k : 1;
    const float* factors = it.first + i * down;
    for (int64_t j = 0; j < it.k; ++j) {
        F line[COLUMNS];
        for (int c = 0; c < COLUMNS; ++c) line[c] = load<F>(from + j * size + c * W);
        for (int l = 0; l < LINES; ++l) {
            const F factor = all(factors[l * down + j * right]);
            for (int c = 0; c < COLUMNS; ++c) sums[l][c] = fma(factor, line[c], sums[l][c]);
        }
    }
    for (int l = 0; l < LINES; ++l)
        for (int c = 0; c < COLUMNS; ++c) store(to + (i + l) * size + c * W, sums[l][c]);
}

template <int COLUMNS>
void mix_columns(const modq_turn& it, bool transpose, int64_t size, const float* from, float* to) {
    int64_t i = 0;
    for (; i + 4 <= it.k; i += 4) mix<4, COLUMNS>(it, transpose, i, size, from, to);
    for (; i < it.k; ++i) mix<1, COLUMNS>(it, transpose, i, size, from, to);
}

// U, or Uᵀ, of it.size numbers; returns where they are then: in `numbers` or in `other`.
float* rotate(const modq_turn& it, bool transpose, float* numbers, float* other) {
    const int64_t size = it.size / it.k;
    for (int64_t line = 0; line < it.k; ++line) transform(numbers + line * size, size);
    if (it.k == 1) return numbers;
    int64_t c = 0;
    for (; c + 2 * W <= size; c += 2 * W) mix_columns<2>(it, transpose, size, numbers + c, other + c);
    for (; c + W <= size; c += W) mix_columns<1>(it, transpose, size, numbers + c, other + c);
    for (; c < size; ++c)
        for (int64_t i = 0; i < it.k; ++i) {
            float total = 0;
            for (int64_t j = 0; j < it.k; ++j)
                total += it.first[transpose ? j * it.k + i : i * it.k + j] * numbers[j * size + c];
            other[i * size + c] = total;
        }
    return other;
}

}  // namespace

Status turn(const modq_turn& it, const Strided& x_at, int64_t m, const Strided& y_at, bool transpose) {
    const Matrix x(x_at), y(y_at);
    const int64_t padded = it.count + W;
    Scratch<float> scales(padded);
    if (!scales) return out_of_memory;
    read_floats(it.scales, float16, 0, it.count, scales.data());
    // The transform is done without its √size, which is divided out first: nothing grows by more than it ends up with.
    const float factor = it.unit * (it.factor ? *it.factor : 1.0f), divisor = 1 / __builtin_sqrtf((float)(it.size / it.k));
    for (int64_t i = 0; i < it.count; i += W)
        store(scales.data() + i, load<F>(scales.data() + i) * factor);
    Status status = done;
    parallel_for(0, m, 1 + (1 << 13) / it.size, [&](int64_t begin, int64_t end) {
        Scratch<float> numbers(it.size + W), other(it.size + W);
        if (!numbers || !other) {
            __atomic_store_n(&status, out_of_memory, __ATOMIC_RELAXED);
            return;
        }
        float* own = numbers.data() + it.offset;
        for (int64_t row = begin; row < end; ++row) {
            if (transpose) {
                std::memset(numbers.data(), 0, sizeof(float) * it.size);
                x.read(row, 0, it.count, own);
                for (int64_t i = 0; i < it.count; ++i) own[i] *= scales.data()[i];
            } else {
                x.read(row, 0, it.size, numbers.data());
            }
            for (int64_t i = 0; i < it.size; i += W) store(numbers.data() + i, load<F>(numbers.data() + i) * divisor);
            float* turned = rotate(it, transpose, numbers.data(), other.data());
            if (transpose) {
                y.write(row, 0, it.size, turned);
            } else {
                for (int64_t i = 0; i < it.count; ++i) turned[it.offset + i] *= scales.data()[i];
                y.write(row, 0, it.count, turned + it.offset);
            }
        }
    });
    return status;
}

}  // namespace MODQ_ISA
}  // namespace modq

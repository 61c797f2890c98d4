// The nearest point of E8P, and of E81B, to each of many vectors: what nearest.py does, W vectors at a time.
//
// No product is fused with a sum, and no vector is treated unlike the others: the codes are the same for every
// instruction set and however many vectors there are.
#include "../e8p.h"
#include "modq/product.h"

namespace modq {
inline namespace MODQ_ISA {
namespace {

constexpr int kRows12 = 29;

// One element of W vectors in each.
struct Eight {
    F at[8];
    F& operator[](int i) { return at[i]; }
    const F& operator[](int i) const { return at[i]; }
};

inline F absolute(F v) { return (F)((U)v & 0x7fffffff); }
inline F lesser(F a, F b) { return a < b ? a : b; }
inline F greater(F a, F b) { return a > b ? a : b; }
inline F sum_of(const Eight& v) {
    return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}

inline void exchange(Eight& v, int i, int j) {
    F high = greater(v[i], v[j]);
    v[j] = lesser(v[i], v[j]);
    v[i] = high;
}

// Descending, by Batcher's network.
inline Eight sorted(Eight v) {
    constexpr int pairs[19][2] = {{0, 1}, {2, 3}, {4, 5}, {6, 7}, {0, 2}, {1, 3}, {4, 6}, {5, 7}, {1, 2}, {5, 6},
                                  {0, 4}, {1, 5}, {2, 6}, {3, 7}, {2, 4}, {3, 5}, {1, 2}, {3, 4}, {5, 6}};
    unrolled<19>([&](auto k) { exchange(v, pairs[k][0], pairs[k][1]); });
    return v;
}

// The best point about one shift: 2 t·v − ‖v‖² less Σ|t|, and how it has it.
struct Best {
    F score;
    I threes, fives;  // how many of the largest elements are at least 3/2, and are 5/2
    I halves;         // for a row of norm² 12: where its ½ stand; else 0
};

// How many numbers, in bits 0 to 7 of a mask, are ones in each element.
inline I is_set(I mask, int element) { return (mask >> element & 1) != 0; }

inline void take(Best& best, F score, int threes, int fives) {
    I better = score > best.score;
    best.score = better ? score : best.score;
    best.threes = better ? I{} + threes : best.threes;
    best.fives = better ? I{} + fives : best.fives;
}

// Raises it where a row of norm² 12, whose sum is odd, is better.
inline void try_rows_12(const modq_e8p_search& it, const Eight& size, F total, F wrong_odd, Best& best) {
    const F base = total + total - 12.0f;
    for (int r = 0; r < kRows12; ++r) {
        int mask = it.halves[r], places[3], found = 0;
        for (int i = 0; i < 8; ++i)
            if (mask >> i & 1) places[found++] = i;
        const F &a = size[places[0]], &b = size[places[1]], &c = size[places[2]];
        F cheapest = lesser(lesser(a, b), c);
        F score = base - 2.0f * (a + b + c) - 2.0f * (cheapest * wrong_odd);
        I better = score > best.score;
        best.score = better ? score : best.score;
        best.halves = better ? I{} + mask : best.halves;
    }
}

inline Best best_about(const modq_e8p_search& it, const Eight& t) {
    Eight size;
    I odd{};
    for (int i = 0; i < 8; ++i) {
        size[i] = absolute(t[i]);
        odd ^= t[i] < 0;
    }
    const F one = all(1), none{};
    const F wrong_even = odd ? one : none, wrong_odd = odd ? none : one;
    Eight u = sorted(size);
    const F flip = 2.0f * u[7], even = flip * wrong_even, uneven = flip * wrong_odd;
    const F s1 = u[0] + u[0], s2 = s1 + (u[1] + u[1]), s3 = s2 + (u[2] + u[2]), s4 = s3 + (u[3] + u[3]);
    Best best{-2.0f - even, I{}, I{}, I{}};
    take(best, s1 - 4.0f - uneven, 1, 0);
    take(best, s2 - 6.0f - even, 2, 0);
    take(best, s3 - 8.0f - uneven, 3, 0);
    take(best, s4 - 10.0f - even, 4, 0);
    take(best, s1 + s1 - 8.0f - even, 1, 1);
    take(best, s1 + s2 - 10.0f - uneven, 2, 1);
    try_rows_12(it, size, sum_of(size), wrong_odd, best);
    return best;
}

// How many elements are larger; of equal ones, the first counts as the larger.
inline void ranks_of(const Eight& size, I* ranks) {
    for (int i = 0; i < 8; ++i) ranks[i] = I{};
    for (int i = 0; i < 8; ++i)
        for (int j = i + 1; j < 8; ++j) {
            I later = size[j] > size[i];  // -1 where it is
            ranks[i] -= later;
            ranks[j] += later + 1;
        }
}

// Bit ... of the sign byte is for element i.
constexpr int kSignBit[8] = {0, 4, 1, 5, 2, 6, 3, 7};

// The codes of the points nearest to W vectors, and the points.
inline I nearest_e8p(const modq_e8p_search& it, const Eight& x, Eight& points) {
    Eight t, other;
    for (int i = 0; i < 8; ++i) {
        t[i] = x[i] - 0.25f;
        other[i] = x[i] + 0.25f;
    }
    Best best = best_about(it, t), below = best_about(it, other);
    Eight size, size_below;
    for (int i = 0; i < 8; ++i) {
        size[i] = absolute(t[i]);
        size_below[i] = absolute(other[i]);
    }
    // ‖x − v − δ‖² = ‖x − δ‖² − Σ|t| − score, and ‖x − δ‖² differs between the shifts by 4 δ Σx.
    const I lower = below.score + sum_of(size_below) > best.score + sum_of(size) + sum_of(x);
    for (int i = 0; i < 8; ++i) {
        t[i] = lower ? other[i] : t[i];
        size[i] = lower ? size_below[i] : size[i];
    }
    const I threes = lower ? below.threes : best.threes, fives = lower ? below.fives : best.fives;
    const I halves = lower ? below.halves : best.halves;
    I ranks[8], level[8], key{}, odd{}, negative[8], cheapest{};
    ranks_of(size, ranks);
    F least = all(__builtin_inff());
    for (int i = 0, power = 1; i < 8; ++i, power *= 3) {
        I by_rank = -(ranks[i] < threes) - (ranks[i] < fives);
        level[i] = (halves != 0) ? is_set(halves, i) + 1 : by_rank;
        key += level[i] * power;
        negative[i] = t[i] < 0;
        odd ^= -level[i] ^ negative[i];  // the lowest bit counts
        F cost = size[i] * to_float(2 * level[i] + 1);
        I cheaper = cost < least;
        least = cheaper ? cost : least;
        cheapest = cheaper ? I{} + i : cheapest;
    }
    const I wrong = (odd & 1) != 0;
    I byte{}, levels{};
    for (int i = 0; i < 8; ++i) {
        negative[i] ^= wrong & (cheapest == i);
        byte |= negative[i] & 1 << kSignBit[i];
        levels += level[i];
        F value = to_float(2 * level[i] + 1) * 0.5f;
        points[i] = (negative[i] ? -value : value) + (lower ? all(-0.25f) : all(0.25f));
    }
    byte ^= (levels & 1) << 7;  // what element 7 is, the row decides too
    byte ^= lower & 1;
    I rows;
    for (int lane = 0; lane < W; ++lane) rows[lane] = it.row_of_key[key[lane]];
    return rows << 8 | byte;
}

// The codes of the points of E81B nearest to W vectors, tried one by one, and the points.
inline I nearest_e81b(const modq_e8p_search& it, const Eight& x, Eight& points) {
    F most = all(-__builtin_inff());
    I code{};
    for (int p = 0; p < 256; ++p) {
        const float* point = it.fine_points + 8 * p;
        Eight product;
        for (int i = 0; i < 8; ++i) product[i] = x[i] * point[i];
        F score = 2.0f * sum_of(product) - it.fine_norms[p];
        I better = score > most;
        most = better ? score : most;
        code = better ? I{} + p : code;
    }
    for (int i = 0; i < 8; ++i)
        for (int lane = 0; lane < W; ++lane) points[i][lane] = it.fine_points[8 * code[lane] + i];
    return code;
}

// W vectors; `codes` are one or two for each.
inline void round(const modq_e8p_search& it, const float* from, float* to, int32_t* codes) {
    Eight x, points, left, finer;
    for (int i = 0; i < 8; ++i)
        for (int lane = 0; lane < W; ++lane) x[i][lane] = from[8 * lane + i];
    const I first = nearest_e8p(it, x, points);
    I second{};
    if (it.bits > 2) {
        for (int i = 0; i < 8; ++i) left[i] = (x[i] - points[i]) * it.scale;
        second = it.bits == 3 ? nearest_e81b(it, left, finer) : nearest_e8p(it, left, finer);
        for (int i = 0; i < 8; ++i) points[i] += finer[i] * (1 / it.scale);
    }
    const int stages = it.bits > 2 ? 2 : 1;
    for (int lane = 0; lane < W; ++lane) {
        codes[stages * lane] = first[lane];
        if (stages > 1) codes[stages * lane + 1] = second[lane];
        for (int i = 0; i < 8; ++i) to[8 * lane + i] = points[i][lane];
    }
}

}  // namespace

Status e8p_nearest(const modq_e8p_search& it, const float* x, int64_t n, float* points, int32_t* codes) {
    const int64_t stages = it.bits > 2 ? 2 : 1;
    parallel_for(0, (n + W - 1) / W, 512 / W, [&](int64_t begin, int64_t end) {
        for (int64_t group = begin; group < end; ++group) {
            const int64_t at = group * W, count = n - at < W ? n - at : W;
            if (count == W) {
                round(it, x + 8 * at, points + 8 * at, codes + stages * at);
                continue;
            }
            float from[8 * W] = {}, to[8 * W];
            int32_t found[2 * W];
            std::memcpy(from, x + 8 * at, sizeof(float) * 8 * count);
            round(it, from, to, found);
            std::memcpy(points + 8 * at, to, sizeof(float) * 8 * count);
            std::memcpy(codes + stages * at, found, sizeof(int32_t) * stages * count);
        }
    });
    return done;
}

}  // namespace MODQ_ISA
}  // namespace modq

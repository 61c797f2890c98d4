// Vectors of W float32 lanes for one instruction set: a source that includes this is compiled once for each.
//
// Arithmetic is written with the compiler's own vector types, so that it means the same everywhere; intrinsics
// stand only where there is no operator. All of it lives in a namespace named after the instruction set,
// because the linker keeps one copy of an inline function: without that, a machine without AVX512 might run
// one that was compiled for it.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "modq/tensors.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef MODQ_ISA
#error "compile with -DMODQ_ISA=<name>, see modq.cmake"
#endif

namespace modq {
inline namespace MODQ_ISA {

#if defined(__AVX512BW__)
constexpr int W = 16;
#else
constexpr int W = 8;
#endif

using F = float __attribute__((vector_size(4 * W)));
using I = int32_t __attribute__((vector_size(4 * W)));
using U = uint32_t __attribute__((vector_size(4 * W)));
using H = int16_t __attribute__((vector_size(4 * W)));   // 2 W lanes
using B = uint8_t __attribute__((vector_size(4 * W)));   // 4 W lanes
using Words = uint16_t __attribute__((vector_size(2 * W)));
using Bytes = uint8_t __attribute__((vector_size(W)));

#define MODQ_INLINE __attribute__((always_inline))

// Calls work(0), work(1), ... work(N - 1) with constants, so that arrays indexed by them are registers.
template <int N, class Work>
MODQ_INLINE inline void unrolled(Work work) {
    if constexpr (N > 0) {
        unrolled<N - 1>(work);
        work(std::integral_constant<int, N - 1>{});
    }
}

template <class V>
inline V load(const void* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

template <class V>
inline void store(void* to, V v) {
    std::memcpy(to, &v, sizeof v);
}

// W integers of 8 or 16 bits as 32, and back to 16.
inline I widen_bytes(const void* at) {
#if defined(__AVX512BW__)
    return (I)_mm512_cvtepu8_epi32(load<__m128i>(at));
#elif defined(__AVX2__)
    return (I)_mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(at)));
#else
    return __builtin_convertvector(load<Bytes>(at), I);
#endif
}

inline U widen_words(const void* at) {
#if defined(__AVX512BW__)
    return (U)_mm512_cvtepu16_epi32(load<__m256i>(at));
#elif defined(__AVX2__)
    return (U)_mm256_cvtepu16_epi32(load<__m128i>(at));
#else
    return __builtin_convertvector(load<Words>(at), U);
#endif
}

inline void store_words(void* at, U v) {
#if defined(__AVX512BW__)
    store(at, _mm512_cvtepi32_epi16((__m512i)v));
#elif defined(__AVX2__)
    __m256i pairs = _mm256_packus_epi32((__m256i)v, (__m256i)v);
    store(at, _mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08)));
#else
    store(at, __builtin_convertvector(v, Words));
#endif
}

// Not F{} + value: that is an addition, since −0 + 0 is 0.
inline F all(float value) {
#if defined(__AVX512BW__)
    return (F)_mm512_set1_ps(value);
#elif defined(__AVX2__)
    return (F)_mm256_set1_ps(value);
#else
    F v;
    for (int i = 0; i < W; ++i) v[i] = value;
    return v;
#endif
}

inline F to_float(I v) { return __builtin_convertvector(v, F); }

// a * b + c, rounded once where the machine can.
inline F fma(F a, F b, F c) {
#if defined(__AVX512BW__)
    return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

// Sums of neighbouring products: [a0 b0 + a1 b1, a2 b2 + a3 b3, ...], exact but for -32768 * -32768 twice.
inline I madd(H a, H b) {
#if defined(__AVX512BW__)
    return (I)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (I)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    __m128i parts[4];
    std::memcpy(parts, &a, 32);
    std::memcpy(parts + 2, &b, 32);
    __m128i sums[2] = {_mm_madd_epi16(parts[0], parts[2]), _mm_madd_epi16(parts[1], parts[3])};
    return load<I>(sums);
#else
    I sums;
    for (int i = 0; i < W; ++i) sums[i] = a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
    return sums;
#endif
}

// sums + madd(a, b)
inline I madd_to(I sums, H a, H b) {
#if defined(__AVX512VNNI__)
    return (I)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)a, (__m512i)b);
#else
    return sums + madd(a, b);
#endif
}

// Each 16 bytes out of twelve of memory: reads 3 W + 4 bytes.
inline B load_twelves(const uint8_t* from) {
#if defined(__AVX512BW__)
    __m512i v = _mm512_castsi128_si512(load<__m128i>(from));
    v = _mm512_inserti32x4(v, load<__m128i>(from + 12), 1);
    v = _mm512_inserti32x4(v, load<__m128i>(from + 24), 2);
    return (B)_mm512_inserti32x4(v, load<__m128i>(from + 36), 3);
#elif defined(__AVX2__)
    return (B)_mm256_inserti128_si256(_mm256_castsi128_si256(load<__m128i>(from)), load<__m128i>(from + 12), 1);
#else
    uint8_t lanes[4 * W];
    for (int i = 0; i < W / 4; ++i) std::memcpy(lanes + 16 * i, from + 12 * i, 16);
    return load<B>(lanes);
#endif
}

// Within each 16 bytes: the byte of `table` that each index (0 to 15) names.
inline B pick(B table, B index) {
#if defined(__AVX512BW__)
    return (B)_mm512_shuffle_epi8((__m512i)table, (__m512i)index);
#elif defined(__AVX2__)
    return (B)_mm256_shuffle_epi8((__m256i)table, (__m256i)index);
#else
    B picked;
    for (int i = 0; i < 4 * W; ++i) picked[i] = table[(i & ~15) + (index[i] & 15)];
    return picked;
#endif
}

// Within each 16 bytes: the first (second) eight of `low` and `high`, put together to 16 bits.
inline H pair_low(B low, B high) {
#if defined(__AVX512BW__)
    return (H)_mm512_unpacklo_epi8((__m512i)low, (__m512i)high);
#elif defined(__AVX2__)
    return (H)_mm256_unpacklo_epi8((__m256i)low, (__m256i)high);
#else
    H pairs;
    for (int i = 0; i < 2 * W; ++i) {
        int from = (i & ~7) * 2 + (i & 7);
        pairs[i] = (int16_t)(low[from] | high[from] << 8);
    }
    return pairs;
#endif
}

inline H pair_high(B low, B high) {
#if defined(__AVX512BW__)
    return (H)_mm512_unpackhi_epi8((__m512i)low, (__m512i)high);
#elif defined(__AVX2__)
    return (H)_mm256_unpackhi_epi8((__m256i)low, (__m256i)high);
#else
    H pairs;
    for (int i = 0; i < 2 * W; ++i) {
        int from = (i & ~7) * 2 + (i & 7) + 8;
        pairs[i] = (int16_t)(low[from] | high[from] << 8);
    }
    return pairs;
#endif
}

// The lanes of `values` that `index` names, 0 to W - 1.
inline F permute(F values, I index) {
#if defined(__AVX512BW__)
    return (F)_mm512_permutexvar_ps((__m512i)index, (__m512)values);
#elif defined(__AVX2__)
    return (F)_mm256_permutevar8x32_ps((__m256)values, (__m256i)index);
#else
    F picked;
    for (int i = 0; i < W; ++i) picked[i] = values[index[i] & (W - 1)];
    return picked;
#endif
}

// A table of up to 16 numbers, to look up W of them at once.
struct Table16 {
    F low, high;

    explicit Table16(const float* numbers, int count) {
        float padded[2 * W] = {};
        std::memcpy(padded, numbers, sizeof(float) * count);
        low = load<F>(padded);
        high = load<F>(padded + W);
    }

    F operator()(I index) const {
        if (W == 16) return permute(low, index);
        return index > 7 ? permute(high, index & 7) : permute(low, index & 7);
    }
};

inline float sum(F v) {
    float lanes[W];
    store(lanes, v);
    for (int n = W / 2; n; n /= 2)
        for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
    return lanes[0];
}

template <int BYTES>
inline uint32_t word(const uint8_t* from) {
    if constexpr (BYTES == 3) return word<2>(from) | (uint32_t)from[2] << 16;
    uint32_t value = 0;
    std::memcpy(&value, from, BYTES);
    return value;
}

// BITS bytes in each of eight lanes, and for 16 lanes the next ones in the others.
template <int BITS>
inline U words(const uint8_t* from) {
#if defined(__AVX512BW__)
    return (U)_mm512_mask_set1_epi32(_mm512_set1_epi32((int)word<BITS>(from)), 0xff00, (int)word<BITS>(from + BITS));
#else
    return U{} + word<BITS>(from);
#endif
}

// W codes of BITS out of the bytes where the first one begins on a byte border.
template <int BITS>
inline I codes(const uint8_t* from) {
    if constexpr (BITS == 8) {
        return widen_bytes(from);
    } else {
        U shifts;
        for (int i = 0; i < W; ++i) shifts[i] = BITS * (i & 7);
        return (I)(words<BITS>(from) >> shifts & ((1u << BITS) - 1));
    }
}

// The code at one place of a stream of BITS.
template <int BITS>
inline int code(const uint8_t* stream, int64_t place) {
    int64_t bit = place * BITS;
    int byte = stream[bit >> 3] >> (bit & 7);
    if (BITS == 3 && (bit & 7) > 5) byte |= stream[(bit >> 3) + 1] << (8 - (bit & 7));
    return byte & ((1 << BITS) - 1);
}

// Half precision, and back with one rounding to nearest even.

inline int64_t size_of(DType dtype) { return dtype == float32 ? 4 : 2; }

inline F from_bfloat16(const void* at) { return (F)(widen_words(at) << 16); }

inline void to_bfloat16(void* at, F v) {
    U bits = (U)v;
    U rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    U nan = bits >> 16 | 64;
    store_words(at, (v == v) ? rounded : nan);
}

// Portable halves: the exponent is moved by a multiplication, which also deals with subnormal numbers.
inline F from_float16(const void* at) {
#if defined(__AVX512BW__)
    return (F)_mm512_maskz_cvtph_ps(0xffff, (__m256i)load<Words>(at));
#elif defined(__F16C__)
    return (F)_mm256_cvtph_ps((__m128i)load<Words>(at));
#else
    U half = widen_words(at);
    U sign = (half & 0x8000) << 16, rest = half & 0x7fff;
    U moved = (U)((F)(rest << 13) * 0x1p112f);
    U special = rest << 13 | 0x7f800000;
    return (F)(((rest >= 0x7c00) ? special : moved) | sign);
#endif
}

inline void to_float16(void* at, F v) {
#if defined(__AVX512BW__)
    store(at, (Words)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
    store(at, (Words)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
    U bits = (U)v, sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    // Adding 2^e to a number below 2^-14 leaves the bits of the subnormal half at the end of the sum.
    U small = (U)((F)size + 0x1p-1f) - 0x3f000000u;
    U normal = (size + 0xfff + (size >> 13 & 1) - (112u << 23)) >> 13;
    U half = (size < (113u << 23)) ? small : normal;
    half = (size >= 0x47800000u) ? ((size > 0x7f800000u) ? U{} + 0x7e00 : U{} + 0x7c00) : half;
    store_words(at, half | sign);
#endif
}

inline F load_as_float(const void* base, DType dtype, int64_t at) {
    const char* bytes = static_cast<const char*>(base);
    if (dtype == float32) return load<F>(bytes + 4 * at);
    return dtype == bfloat16 ? from_bfloat16(bytes + 2 * at) : from_float16(bytes + 2 * at);
}

inline void store_float(void* base, DType dtype, int64_t at, F v) {
    char* bytes = static_cast<char*>(base);
    if (dtype == float32) store(bytes + 4 * at, v);
    else if (dtype == bfloat16) to_bfloat16(bytes + 2 * at, v);
    else to_float16(bytes + 2 * at, v);
}

// Numbers of any of these dtypes as float32; whole vectors first, then the rest through a padded one.
inline void read_floats(const void* base, DType dtype, int64_t at, int64_t count, float* to) {
    int64_t i = 0;
    for (; i + W <= count; i += W) store(to + i, load_as_float(base, dtype, at + i));
    if (i == count) return;
    float rest[W] = {};
    std::memcpy(rest, static_cast<const char*>(base) + (at + i) * size_of(dtype), (count - i) * size_of(dtype));
    store(rest, load_as_float(rest, dtype, 0));
    std::memcpy(to + i, rest, sizeof(float) * (count - i));
}

inline void write_floats(void* base, DType dtype, int64_t at, int64_t count, const float* from) {
    int64_t i = 0;
    for (; i + W <= count; i += W) store_float(base, dtype, at + i, load<F>(from + i));
    if (i == count) return;
    float rest[W] = {};
    std::memcpy(rest, from + i, sizeof(float) * (count - i));
    store_float(rest, dtype, 0, load<F>(rest));
    std::memcpy(static_cast<char*>(base) + (at + i) * size_of(dtype), rest, (count - i) * size_of(dtype));
}

}  // namespace MODQ_ISA
}  // namespace modq

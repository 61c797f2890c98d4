// The affine layout: decoding, and products with few rows.
#include "../layouts.h"
#include "../widths.h"
#include "modq/fixed.h"

namespace modq {
inline namespace MODQ_ISA {
namespace {

// At most this many columns are decoded between two looks at scales.
constexpr int64_t kPart = 256;

template <int BITS>
struct Affine final : Decoder {
    const modq_affine& it;
    int64_t groups;

    explicit Affine(const modq_affine& given)
        : Decoder(given.rows, given.columns), it(given),
          groups((given.columns + given.group_size - 1) / given.group_size) {}

    const uint8_t* row_codes(int64_t row) const { return it.codes + row * it.codes_stride; }

    // scales and zeros of the groups from `first` on
    void read_groups(int64_t row, int64_t first, int64_t count, float* scales, float* zeros) const {
        read_floats(it.scales, DType(it.scale_dtype), row * groups + first, count, scales);
        if (!it.zeros) {
            for (int64_t g = 0; g < count; ++g) zeros[g] = 1 << (BITS - 1);
        } else if (it.zeros_stride) {
            const uint8_t* stream = static_cast<const uint8_t*>(it.zeros) + row * it.zeros_stride;
            int64_t g = 0;
            if (first % 8 == 0)
                for (; g + W <= count; g += W) store(zeros + g, to_float(codes<BITS>(stream + (first + g) / 8 * BITS)));
            for (; g < count; ++g) zeros[g] = code<BITS>(stream, first + g);
        } else {
            read_floats(it.zeros, DType(it.scale_dtype), row * groups + first, count, zeros);
        }
    }

    void decode(int64_t row, int64_t column, int64_t count, float* to) const override {
        float scales[kPart], zeros[kPart];
        const uint8_t* stream = row_codes(row);
        for (int64_t done = 0; done < count; done += kPart) {
            int64_t start = column + done, stop = column + (count - done < kPart ? count : done + kPart);
            int64_t first = start / it.group_size;
            read_groups(row, first, (stop - 1) / it.group_size + 1 - first, scales, zeros);
            for (int64_t at = start, g = 0; at < stop; ++g) {
                int64_t end = (first + g + 1) * it.group_size;
                if (end > stop) end = stop;
                decode_run(stream, at, end, scales[g], zeros[g], to + (at - column));
                at = end;
            }
        }
    }

    static void decode_run(const uint8_t* stream, int64_t at, int64_t end, float scale, float zero, float* to) {
        for (; at < end && at % 8; ++at) *to++ = ((float)code<BITS>(stream, at) - zero) * scale;
        for (; at + W <= end; at += W, to += W)
            store(to, (to_float(codes<BITS>(stream + at / 8 * BITS)) - zero) * scale);
        for (; at < end; ++at) *to++ = ((float)code<BITS>(stream, at) - zero) * scale;
    }
};

// How 4 W bytes, or for 3 bits three quarters of that, of codes become lanes of 16 bits that hold a code times
// a power of two. Codes with the same power share a sum, which `combine` brings to the same unit.
template <int BITS>
struct Chunk;

template <>
struct Chunk<8> {
    static constexpr int columns = 4 * W, bytes = 4 * W, reads = 4 * W, vectors = 2, sums = 1;
    static constexpr int sum_of[] = {0, 0};
    static int column(int vector, int lane) { return 2 * lane + vector; }
    static void unpack(const uint8_t* from, H* to) {
        H raw = load<H>(from);
        to[0] = raw & 0xff;
        to[1] = (H)((UH)raw >> 8);
    }
    static constexpr float scale = 1;
    static F combine(const I* sums) { return to_float(sums[0]); }

  private:
    using UH = uint16_t __attribute__((vector_size(4 * W)));
};

template <>
struct Chunk<4> {
    static constexpr int columns = 8 * W, bytes = 4 * W, reads = 4 * W, vectors = 4, sums = 2;
    static constexpr int sum_of[] = {0, 1, 0, 1};
    static int column(int vector, int lane) { return 4 * lane + vector; }
    static void unpack(const uint8_t* from, H* to) {
        using UH = uint16_t __attribute__((vector_size(4 * W)));
        H raw = load<H>(from), high = (H)((UH)raw >> 8);
        to[0] = raw & 0x0f;
        to[1] = raw & 0xf0;
        to[2] = high & 0x0f;
        to[3] = high & 0xf0;
    }
    static constexpr float scale = 0x1p-4f;
    static F combine(const I* sums) { return to_float((sums[0] << 4) + sums[1]); }
};

template <>
struct Chunk<2> {
    static constexpr int columns = 16 * W, bytes = 4 * W, reads = 4 * W, vectors = 8, sums = 4;
    static constexpr int sum_of[] = {0, 1, 2, 3, 0, 1, 2, 3};
    static int column(int vector, int lane) { return 8 * lane + vector; }
    static void unpack(const uint8_t* from, H* to) {
        using UH = uint16_t __attribute__((vector_size(4 * W)));
        H raw = load<H>(from), high = (H)((UH)raw >> 8);
        unrolled<4>([&](auto i) {
            to[i] = raw & (int16_t)(3 << 2 * i);
            to[4 + i] = high & (int16_t)(3 << 2 * i);
        });
    }
    static constexpr float scale = 0x1p-6f;
    static F combine(const I* s) { return to_float((((((s[0] << 2) + s[1]) << 2) + s[2]) << 2) + s[3]); }
};

// Where each lane of Chunk<3> looks.
struct Windows {
    uint8_t bytes[4 * W] = {};
    int16_t mask[2 * W] = {};
    float unit[W] = {};
    int column[2 * W] = {};

    constexpr Windows() {
        for (int lane = 0; lane < 2 * W; ++lane) {
            int pair = lane % 8 / 4, last = lane / 2 % 2, triple = 2 * pair + lane % 2;
            bytes[2 * lane] = (uint8_t)(3 * triple + last);
            bytes[2 * lane + 1] = (uint8_t)(3 * triple + last + 1);
            mask[lane] = last ? 0x70 : 0x07;
            unit[lane / 2] = last ? 0x1p-4f : 1.0f;
            column[lane] = lane / 8 * 32 + triple * 8 + last * 4;
        }
    }
};

// Three bytes hold eight codes; their first two hold codes 0 to 3 from bit 0, their last two 4 to 7 from bit 4.
// Each 16 bytes of a vector take twelve: pairs of first windows alternate with pairs of last ones, since
// neighbouring lanes are summed up.
template <>
struct Chunk<3> {
    static constexpr int columns = 8 * W, bytes = 3 * W, reads = 3 * W + 4, vectors = 4, sums = 3;
    static constexpr int sum_of[] = {0, 1, 2, 0};

    static constexpr Windows windows{};

    static int column(int vector, int lane) { return windows.column[lane] + vector; }
    static void unpack(const uint8_t* from, H* to) {
        using UH = uint16_t __attribute__((vector_size(4 * W)));
        H lanes = (H)pick(load_twelves(from), load<B>(windows.bytes)), mask = load<H>(windows.mask);
        to[0] = lanes & mask;
        to[1] = lanes & (mask << 3);
        to[2] = lanes & (mask << 6);
        to[3] = (H)((UH)lanes >> 9) & mask;
    }
    static constexpr float scale = 1;
    static F combine(const I* s) {
        F eighths = fma(to_float(s[2]), all(0x1p-3f), to_float(s[1]));
        return fma(eighths, all(0x1p-3f), to_float(s[0])) * load<F>(windows.unit);
    }
};

template <int BITS>
bool fits(const Affine<BITS>& w) {
    int64_t g = w.it.group_size, chunk = Chunk<BITS>::columns;
    return g >= 32 && (g % chunk == 0 || chunk % g == 0);
}

template <int BITS>
Fixed form_of(const Affine<BITS>& w) {
    int64_t chunk = Chunk<BITS>::columns, g = w.it.group_size;
    if (g < chunk) return {chunk, chunk, g, w.columns};
    int64_t block = chunk;  // sums of 32 bits hold 256 columns of the largest products
    while (2 * block <= 256 && g % (2 * block) == 0) block *= 2;
    return {chunk, block, block, w.columns};
}

// Reads the numbers of a row for each unit; `to` and `groups` have room for a vector more.
template <int BITS>
void read_units(const Affine<BITS>& w, const Fixed& form, int64_t per_group, int64_t row, float* groups, Units to) {
    const bool spread = per_group > 1;
    float *scales = spread ? groups : to.scales, *zeros = spread ? groups + w.groups + W : to.shifts;
    w.read_groups(row, 0, w.groups, scales, zeros);
    if (spread) {
        for (int64_t u = 0; u * form.unit < w.columns; ++u) {
            to.scales[u] = scales[u / per_group];
            to.shifts[u] = zeros[u / per_group];
        }
    }
    for (int64_t u = 0; u < form.units; u += W)
        store(to.shifts + u, load<F>(to.shifts + u) * load<F>(to.scales + u));
}

template <int BITS>
Status few_rows(const Affine<BITS>& w, Matrix x, int64_t m, Matrix y) {
    const Fixed form = form_of(w);
    const int64_t per_group = w.it.group_size / form.unit;
    const int64_t room = form.units + 2 * W, bytes = (w.columns * BITS + 7) / 8;
    auto codes = [&](int64_t row) { return Codes{w.row_codes(row), bytes, w.row_codes(w.rows - 1) + bytes}; };
    return fixed_forward(
        Chunk<BITS>{}, form, w.rows, x, m, y, 2 * room + 2 * (w.groups + W), codes, [&](int64_t row, float* space) {
            Units units{space, space + room};
            read_units(w, form, per_group, row, space + 2 * room, units);
            return units;
        }
    );
}

template <int BITS>
Status product(const modq_affine& it, Matrix x, int64_t m, Matrix y, bool transpose) {
    Affine<BITS> w(it);
    if (transpose) return transposed(w, x, m, y);
    if constexpr (BITS > 1)
        if (x.dtype != float32 && fits(w)) return few_rows(w, x, m, y);
    return forward(w, x, m, y);
}

}  // namespace

Status affine_product(const modq_affine& it, const Strided& x, int64_t m, const Strided& y, bool transpose) {
    return for_bits(it.bits, [&](auto bits) { return product<decltype(bits)::value>(it, x, m, y, transpose); });
}

Status affine_dequantize(
    const modq_affine& it, int64_t row0, int64_t row1, int64_t column0, int64_t column1, const Strided& to
) {
    return for_bits(it.bits, [&](auto bits) {
        return dequantize(Affine<decltype(bits)::value>(it), row0, row1, column0, column1, to);
    });
}

}  // namespace MODQ_ISA
}  // namespace modq

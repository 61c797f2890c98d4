// What Python calls: each picks the code for the instruction set in use.
#include "layouts.h"
#include "modq/isa.h"
#include "modq/tensors.h"

namespace modq {

#define MODQ_DECLARE(isa)                                                                               \
    namespace isa {                                                                                     \
    Status affine_product(const modq_affine&, const Strided&, int64_t, const Strided&, bool);           \
    Status affine_dequantize(const modq_affine&, int64_t, int64_t, int64_t, int64_t, const Strided&);   \
    Status codebook_product(const modq_codebook&, const Strided&, int64_t, const Strided&, bool);       \
    Status codebook_dequantize(const modq_codebook&, int64_t, int64_t, int64_t, int64_t, const Strided&); \
    Status codebook_encode(const modq_search&, const float*, int64_t, uint8_t*, float*);                \
    Status vector_product(const modq_vector&, const Strided&, int64_t, const Strided&, bool);           \
    Status vector_dequantize(const modq_vector&, int64_t, int64_t, int64_t, int64_t, const Strided&);   \
    }
MODQ_FOR_EACH_ISA(MODQ_DECLARE)
#undef MODQ_DECLARE

// y = x Wᵀ, or x W; m rows.
MODQ_EXPORT int32_t modq_affine_product(
    const modq_affine* it, const Strided* x, int64_t m, const Strided* y, int32_t transpose
) {
    return MODQ_CHOOSE(affine_product)(*it, *x, m, *y, transpose != 0);
}

MODQ_EXPORT int32_t modq_codebook_product(
    const modq_codebook* it, const Strided* x, int64_t m, const Strided* y, int32_t transpose
) {
    return MODQ_CHOOSE(codebook_product)(*it, *x, m, *y, transpose != 0);
}

MODQ_EXPORT int32_t modq_vector_product(
    const modq_vector* it, const Strided* x, int64_t m, const Strided* y, int32_t transpose
) {
    return MODQ_CHOOSE(vector_product)(*it, *x, m, *y, transpose != 0);
}

// to = W[row0:row1, column0:column1]
MODQ_EXPORT int32_t modq_affine_dequantize(
    const modq_affine* it, int64_t row0, int64_t row1, int64_t column0, int64_t column1, const Strided* to
) {
    return MODQ_CHOOSE(affine_dequantize)(*it, row0, row1, column0, column1, *to);
}

MODQ_EXPORT int32_t modq_codebook_dequantize(
    const modq_codebook* it, int64_t row0, int64_t row1, int64_t column0, int64_t column1, const Strided* to
) {
    return MODQ_CHOOSE(codebook_dequantize)(*it, row0, row1, column0, column1, *to);
}

MODQ_EXPORT int32_t modq_vector_dequantize(
    const modq_vector* it, int64_t row0, int64_t row1, int64_t column0, int64_t column1, const Strided* to
) {
    return MODQ_CHOOSE(vector_dequantize)(*it, row0, row1, column0, column1, *to);
}

// Encodes a flat run that starts with a block: a code for each number, an absmax scale for each block.
MODQ_EXPORT int32_t modq_codebook_encode(
    const modq_search* it, const float* run, int64_t count, uint8_t* codes, float* scales
) {
    return MODQ_CHOOSE(codebook_encode)(*it, run, count, codes, scales);
}

}  // namespace modq

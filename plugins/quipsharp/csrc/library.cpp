// What Python calls: each picks the code for the instruction set in use.
#include "e8p.h"
#include "modq/isa.h"
#include "modq/tensors.h"

namespace modq {

#define DECLARE(isa)                                                                              \
    namespace isa {                                                                               \
    Status e8p_product(const modq_e8p&, const Strided&, int64_t, const Strided&, bool);           \
    Status e8p_dequantize(const modq_e8p&, int64_t, int64_t, int64_t, int64_t, const Strided&);   \
    Status e8p_nearest(const modq_e8p_search&, const float*, int64_t, float*, int32_t*);          \
    Status turn(const modq_turn&, const Strided&, int64_t, const Strided&, bool);                 \
    }
MODQ_FOR_EACH_ISA(DECLARE)
#undef DECLARE

// y = x Wᵀ, or x W; m rows.
MODQ_EXPORT int32_t modq_e8p_product(
    const modq_e8p* it, const Strided* x, int64_t m, const Strided* y, int32_t transpose
) {
    return MODQ_CHOOSE(e8p_product)(*it, *x, m, *y, transpose != 0);
}

// to = W[row0:row1, column0:column1]
MODQ_EXPORT int32_t modq_e8p_dequantize(
    const modq_e8p* it, int64_t row0, int64_t row1, int64_t column0, int64_t column1, const Strided* to
) {
    return MODQ_CHOOSE(e8p_dequantize)(*it, row0, row1, column0, column1, *to);
}

// The points nearest to n vectors of 8, and their codes: one each at 2 bits, else two.
MODQ_EXPORT int32_t modq_e8p_nearest(
    const modq_e8p_search* it, const float* x, int64_t n, float* points, int32_t* codes
) {
    return MODQ_CHOOSE(e8p_nearest)(*it, x, n, points, codes);
}

// y = x Aᵀ, or x A for the transpose; m rows.
MODQ_EXPORT int32_t modq_turn_apply(
    const modq_turn* it, const Strided* x, int64_t m, const Strided* y, int32_t transpose
) {
    return MODQ_CHOOSE(turn)(*it, *x, m, *y, transpose != 0);
}

}  // namespace modq

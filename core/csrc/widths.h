// From a width that is known when a program runs to one that is known when it is compiled.
#pragma once

#include "modq/product.h"

namespace modq {
inline namespace MODQ_ISA {

template <class Work>
Status for_bits(int64_t bits, Work work) {
    switch (bits) {
        case 1: return work(std::integral_constant<int, 1>{});
        case 2: return work(std::integral_constant<int, 2>{});
        case 3: return work(std::integral_constant<int, 3>{});
        case 4: return work(std::integral_constant<int, 4>{});
        case 8: return work(std::integral_constant<int, 8>{});
        default: return not_covered;
    }
}

}  // namespace MODQ_ISA
}  // namespace modq

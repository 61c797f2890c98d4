// Tensors as they cross from Python: plain C, so that ctypes can spell them.
#pragma once

#include <cstdint>

namespace modq {

enum DType : int32_t { float32 = 0, bfloat16 = 1, float16 = 2 };

enum Status : int32_t { done = 0, out_of_memory = 1, not_covered = 2 };

// A matrix whose rows are contiguous.
struct Strided {
    void* data;
    int64_t stride;  // elements from a row to the next one
    int32_t dtype;
};

}  // namespace modq

// What crosses from Python: where the tensors of E8P codes and the tables lie. Plain C, so that ctypes can spell it.
#pragma once

#include <cstdint>

extern "C" {

// A point of E8P times four, eight numbers of 16 bits, is row_table[code >> 8] ^ sign_table[code & 255]; see cpu.py.
struct modq_e8p {
    int64_t rows, columns, bits;
    const uint8_t* codes;  // two bytes for each run of 8 columns
    int64_t codes_stride;  // bytes from a row to the next
    const uint8_t* residual;  // 3 bits: a byte for each run; 4 bits: as codes
    int64_t residual_stride;
    const int16_t* row_table;   // (256, 8)
    const int16_t* sign_table;  // (256, 8)
    const int16_t* fine_table;  // (256, 8): the points of E81B times four
    float finer;                 // what points of the second stage are multiplied by
    int32_t half;                // whether x, in float32, is no finer than half precision
};

// A = diag(scales · factor · unit) P U: U = first ⊗ F, F the orthonormal Walsh-Hadamard matrix, and P keeps `count`
// of the `size` numbers from `offset` on.
struct modq_turn {
    int64_t size, k, offset, count;
    const float* first;   // (k, k), orthogonal; not read for k = 1
    const void* scales;   // float16 (count)
    const float* factor;  // one number, or null for 1
    float unit;
};

// How vectors find the nearest points.
struct modq_e8p_search {
    int64_t bits;
    const uint8_t* row_of_key;  // the row of A whose entries (1, 3, 5) / 2 are the digits (0, 1, 2) of the key
    const uint8_t* halves;      // 29: where the ½ of the rows of norm² 12 stand, a bit for each element
    const float* fine_points;   // (256, 8) E81B
    const float* fine_norms;    // 256
    float scale;                // what is left over is multiplied by this for the second stage
};
}

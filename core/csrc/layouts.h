// What crosses from Python: where the tensors of a layout lie. Plain C, so that ctypes can spell it.
#pragma once

#include <cstdint>

extern "C" {

// Integers with a scale and a zero for each group of columns; see layouts/affine.py.
struct modq_affine {
    int64_t rows, columns, bits, group_size;
    const uint8_t* codes;
    int64_t codes_stride;  // bytes from a row to the next
    const void* scales;    // (rows, groups)
    const void* zeros;     // a bit stream a row, or numbers like scales; NULL: the middle everywhere
    int64_t zeros_stride;  // bytes from a row of a stream to the next; 0: numbers
    int32_t scale_dtype;
};

// Indices into a table with a scale for each block of the flat matrix; see layouts/codebook.py.
struct modq_codebook {
    int64_t rows, columns, bits, block_size;
    const uint8_t* codes;
    int64_t codes_stride;
    const float* table;         // 2^bits
    const float* scales;        // a number a block, or one for each nested block
    const uint8_t* scale_codes; // NULL: scales are not nested
    const float* scale_table;   // 256
    const float* scale_offset;  // 1
    int64_t nested_block_size;
};

// Codes of vectors, sums of an entry of each table; see layouts/vector.py.
struct modq_vector {
    int64_t rows, columns, bits, codebooks, vector_size;
    const void* codes;   // (rows, columns / vector_size, codebooks), of 16 bits if bits are more than 8, else of 8
    const void* tables;  // (codebooks, 2^bits, vector_size)
    const void* scales;  // (rows,)
    int32_t dtype;       // of tables and scales
};

// How numbers find the nearest entry of a table.
struct modq_search {
    int64_t block_size, entries;  // a power of two
    const float* borders;         // between the sorted entries
    const uint8_t* code_of;       // the code of each, in that order
};
}

// The functions behind the library's self-test, one for each instruction set.
#pragma once

#include "modq/isa.h"

#define MODQ_DECLARE(isa)                             \
    namespace isa {                                     \
    const char* compiled_for();                         \
    int64_t sum(const int32_t* values, int64_t count); \
    }
MODQ_FOR_EACH_ISA(MODQ_DECLARE)
#undef MODQ_DECLARE

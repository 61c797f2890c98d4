// What modq_probe runs for each instruction set: it says by which code it was compiled.
#include "probe.h"

#define MODQ_TEXT_(isa) #isa
#define MODQ_TEXT(isa) MODQ_TEXT_(isa)

namespace MODQ_ISA {

const char* compiled_for() { return MODQ_TEXT(MODQ_ISA); }

int64_t sum(const int32_t* values, int64_t count) {
    int64_t total = 0;
    for (int64_t i = 0; i < count; ++i) total += values[i];
    return total;
}

}  // namespace MODQ_ISA

// Which instruction set to run: the best one that this machine has, or the one that is asked for.
//
// A file that is compiled once for each instruction set defines its functions in the namespace MODQ_ISA. One that is
// compiled once declares them all, and picks:
//
//     #define DECLARE(isa) namespace isa { float sum(const float* x, int64_t n); }
//     MODQ_FOR_EACH_ISA(DECLARE)
//     float sum(const float* x, int64_t n) { return MODQ_CHOOSE(sum)(x, n); }
#pragma once

#include <cstddef>
#include <cstring>

#include "modq/parallel.h"

// From the oldest machines to the newest; the names and flags are those of modq.cmake.
#if defined(__x86_64__)
#define MODQ_FOR_EACH_ISA(macro) macro(portable) macro(avx2) macro(avx512)
#define MODQ_CHOOSE(function) (::modq::choose(&portable::function, &avx2::function, &avx512::function))
#else
#define MODQ_FOR_EACH_ISA(macro) macro(portable)
#define MODQ_CHOOSE(function) (::modq::choose(&portable::function))
#endif

namespace modq {

#define MODQ_NAME(isa) #isa,
inline constexpr const char* isa_names[] = {MODQ_FOR_EACH_ISA(MODQ_NAME)};
#undef MODQ_NAME
inline constexpr size_t isa_count = sizeof(isa_names) / sizeof(isa_names[0]);

// Whether this machine, and its operating system for the registers, can run it.
inline bool isa_runs(size_t isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
    const bool runs[] = {true, avx2, avx512};
    static_assert(sizeof(runs) / sizeof(runs[0]) == isa_count);
    return runs[isa];
#else
    return isa == 0;
#endif
}

inline size_t best_isa() {
    size_t best = isa_count - 1;
    while (!isa_runs(best)) --best;
    return best;
}

// Set by Python when it loads the library. A constant at first: a file compiled for AVX-512 that includes this would
// else compute it, with its own instructions, on a machine without them.
inline size_t chosen_isa = 0;

template <class Function, class... Others>
Function choose(Function first, Others... others) {
    const Function all[] = {first, others...};
    return all[chosen_isa];
}

}  // namespace modq

// The name of the instruction set in use.
MODQ_EXPORT inline const char* modq_isa() { return modq::isa_names[modq::chosen_isa]; }

// The name of the number-th instruction set that this machine runs, or null: portable is number 0.
MODQ_EXPORT inline const char* modq_isa_name(int number) {
    if (number < 0 || static_cast<size_t>(number) >= modq::isa_count) return nullptr;
    return modq::isa_runs(number) ? modq::isa_names[number] : nullptr;
}

// Use the instruction set of this name, or the best one for null; 0 if this machine runs it, and 1, with nothing
// changed, if not.
MODQ_EXPORT inline int modq_use_isa(const char* name) {
    if (name == nullptr) {
        modq::chosen_isa = modq::best_isa();
        return 0;
    }
    for (size_t isa = 0; isa < modq::isa_count; ++isa) {
        if (std::strcmp(name, modq::isa_names[isa]) == 0 && modq::isa_runs(isa)) {
            modq::chosen_isa = isa;
            return 0;
        }
    }
    return 1;
}

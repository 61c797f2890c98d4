// The library's self-test: that its loops run on torch's threads, nest, fail, and use the instruction set chosen.
#include "probe.h"

#include <mutex>
#include <set>
#include <thread>

// The name that the code for the instruction set in use was compiled with.
MODQ_EXPORT const char* modq_probe_isa() { return MODQ_CHOOSE(compiled_for)(); }

// How many threads torch lends now.
MODQ_EXPORT int64_t modq_probe_threads() { return modq::num_threads(); }

// Sums values in a loop inside a loop; `used` is how many threads took part. A negative value throws inside the
// loop: then the result is -1.
MODQ_EXPORT int64_t modq_probe_sum(const int32_t* values, int64_t count, int64_t grain, int64_t* used) {
    std::atomic<int64_t> total{0};
    std::mutex lock;
    std::set<std::thread::id> threads;
    const auto part = [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            if (values[i] < 0) throw std::runtime_error("negative");
        }
        total += MODQ_CHOOSE(sum)(values + begin, end - begin);
        const std::lock_guard<std::mutex> guard(lock);
        threads.insert(std::this_thread::get_id());
    };
    try {
        modq::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
            modq::parallel_for(begin, end, grain, part);
        });
    } catch (const std::runtime_error&) {
        return -1;
    }
    *used = static_cast<int64_t>(threads.size());
    return total;
}

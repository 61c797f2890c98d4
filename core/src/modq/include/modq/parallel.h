// A loop on torch's own threads, for libraries that link to nothing of torch.
//
// Python hands over the addresses of two functions of torch's stable C interface (2.10 and later) when it loads the
// library. Without them, every loop runs on the thread that calls it. Threads beside torch's own would fight with
// them for the cores, and torch.set_num_threads would not reach them.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <stdexcept>
#include <type_traits>

#define MODQ_EXPORT extern "C" __attribute__((visibility("default"), used))

namespace modq {

// torch's own types: an error code that is 0 for success, and what a loop does for a part of its range.
using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, RangeFunction function, void* context);
using NumThreads = int32_t (*)(uint32_t* threads);

// One for each library: nothing but modq_init is visible from outside.
inline ParallelFor torch_parallel_for = nullptr;
inline NumThreads torch_num_threads = nullptr;

// How many threads a loop may use now.
inline int64_t num_threads() {
    uint32_t threads = 1;
    if (torch_num_threads == nullptr || torch_num_threads(&threads) != 0) return 1;
    return threads;
}

namespace detail {

template <class Function>
struct Loop {
    Function& function;
    std::atomic_flag failed = ATOMIC_FLAG_INIT;
    std::exception_ptr error = nullptr;

    // No exception may cross torch's C interface, nor leave a thread of its pool.
    static void run(int64_t begin, int64_t end, void* context) {
        auto& loop = *static_cast<Loop*>(context);
        try {
            loop.function(begin, end);
        } catch (...) {
            if (!loop.failed.test_and_set()) loop.error = std::current_exception();
        }
    }
};

}  // namespace detail

// Calls function(begin, end) for parts of the range that together are all of it, each of `grain` or more but the
// last one. Inside another loop it runs on one thread. The first exception that a part throws is thrown again here.
template <class Function>
void parallel_for(int64_t begin, int64_t end, int64_t grain, Function&& function) {
    if (begin >= end) return;
    if (torch_parallel_for == nullptr || end - begin <= grain) {
        function(begin, end);
        return;
    }
    using Loop = detail::Loop<std::remove_reference_t<Function>>;
    Loop loop{function};
    const int32_t code = torch_parallel_for(begin, end, grain, &Loop::run, &loop);
    if (loop.error) std::rethrow_exception(loop.error);
    if (code != 0) throw std::runtime_error("torch_parallel_for failed");
}

// Calls function(next_share) on each thread; while next_share(&begin, &end) is true, it has a part of 0 to `count` to do.
// Shares are taken as threads get ready for them, so one whose processor is taken away holds up the others little.
template <class Function>
void parallel_shares(int64_t count, int64_t least, Function&& function) {
    constexpr int64_t kShares = 5;  // a thread's, if all are equally fast
    const int64_t threads = num_threads(), even = count / (kShares * threads);
    const int64_t share = even > least ? even : least;
    std::atomic<int64_t> next{0};
    const auto next_share = [&](int64_t* begin, int64_t* end) {
        *begin = next.fetch_add(share, std::memory_order_relaxed);
        *end = *begin + share < count ? *begin + share : count;
        return *begin < count;
    };
    const int64_t shares = (count + share - 1) / share;
    parallel_for(0, shares < threads ? shares : threads, 1, [&](int64_t, int64_t) { function(next_share); });
}

}  // namespace modq

// Called once by Python when it loads the library; null for what this torch does not have.
MODQ_EXPORT inline void modq_init(void* parallel_for, void* num_threads) {
    modq::torch_parallel_for = reinterpret_cast<modq::ParallelFor>(parallel_for);
    modq::torch_num_threads = reinterpret_cast<modq::NumThreads>(num_threads);
}

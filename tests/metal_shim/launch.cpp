// Runs the kernels of kernels/decode.metal on a CPU, one simdgroup after another, as torch.mps.compile_shader would
// launch them on a grid of one dimension.

#include <functional>
#include <type_traits>
#include <utility>
#include "../../kernels/decode.metal"

namespace {
std::function<void(uint)> body;
uint first;                                         // thread of the simdgroup that runs
char stacks[32][1 << 16];

void run_lane() { body(first + shim::lane); }

// An argument of type A: a buffer, a struct in constant memory, or the thread's index.
template <class A> A argument(void* buffer, uint i) {
    if constexpr (std::is_same_v<A, uint>) return i;
    else if constexpr (std::is_pointer_v<A>) return static_cast<A>(buffer);
    else return *static_cast<std::remove_reference_t<A>*>(buffer);
}

template <class... A, size_t... n>
void fix_arguments(void (*f)(A...), void** buffers, std::index_sequence<n...>) {
    body = [=](uint i) { f(argument<A>(n + 1 < sizeof...(A) ? buffers[n] : nullptr, i)...); };
}

// Why it went wrong, or null.
template <class... A> const char* launch(void (*f)(A...), void** buffers, uint count, uint threads) {
    if (count + 1 != sizeof...(A)) return "not as many buffers as the kernel has arguments";
    fix_arguments(f, buffers, std::index_sequence_for<A...>());
    for (first = 0; first < threads; first += 32) {
        shim::active = std::min(32u, threads - first);
        for (uint i = 0; i < shim::active; i++) {
            shim::exchanges[i] = 0;
            getcontext(&shim::lanes[i]);
            shim::lanes[i].uc_stack.ss_sp = stacks[i];
            shim::lanes[i].uc_stack.ss_size = sizeof stacks[i];
            shim::lanes[i].uc_link = &shim::scheduler;
            makecontext(&shim::lanes[i], run_lane, 0);
        }
        for (bool more = true; more;) {             // each round takes every lane to its next exchange, or its end
            uint before[32], waiting = 0;
            std::copy(shim::exchanges, shim::exchanges + 32, before);
            for (shim::lane = 0; shim::lane < shim::active; shim::lane++) {
                swapcontext(&shim::scheduler, &shim::lanes[shim::lane]);
                waiting += shim::exchanges[shim::lane] != before[shim::lane];
            }
            if (waiting != 0 && waiting != shim::active) return "some lanes exchange values, others have ended";
            more = waiting != 0;
        }
    }
    return nullptr;
}
}

extern "C" const char* launch_attend(void** buffers, uint count, uint threads) {
    return launch(attend, buffers, count, threads);
}

extern "C" const char* launch_combine(void** buffers, uint count, uint threads) {
    return launch(combine, buffers, count, threads);
}

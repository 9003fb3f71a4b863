// As much of CUDA as the files of tests/emulated.py ask for, on a CPU: blocks one after the other, a thread for each of their threads.
// Stands in for csrc/launch.cuh and cuda_runtime.h.
#pragma once

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <deque>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

using cudaStream_t = void*;
using std::min;

struct float4 {
    float x, y, z, w;
};
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline thread_local dim3 threadIdx, blockIdx, gridDim;

struct Warp {
    std::barrier<> arrived{32};
    float values[32];
};
inline thread_local Warp* warp;
inline thread_local std::barrier<>* block;
inline void __syncthreads() { block->arrive_and_wait(); }

namespace clone_fast {

[[noreturn]] inline void fail(const char* op, const std::string& what) { throw std::runtime_error(op + (": " + what)); }
inline bool is_aligned(const void* at) { return reinterpret_cast<std::uintptr_t>(at) % 16 == 0; }
template <typename A, typename B>
constexpr auto ceil_div(A a, B b) {
    return (a + b - 1) / b;
}
inline void wait_for_previous() {}
inline void let_next_come() {}

inline float warp_sum(float value) {
    warp->values[threadIdx.x % 32] = value;
    warp->arrived.arrive_and_wait();
    float sum = 0;
    for (const float one : warp->values) sum += one;
    warp->arrived.arrive_and_wait();
    return sum;
}

template <typename... Parameters, typename... Args>
void launch_early(const char*, void (*kernel)(Parameters...), dim3 grid, int threads, int, cudaStream_t,
                  const Args&... args) {
    for (unsigned i = 0; i < grid.x * grid.y * grid.z; ++i) {
        std::barrier<> all(threads);
        std::deque<Warp> warps(threads / 32);
        std::vector<std::thread> running;
        for (int t = 0; t < threads; ++t)
            running.emplace_back([&, t] {
                threadIdx = dim3(t, 0, 0), gridDim = grid;
                blockIdx = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
                warp = &warps[t / 32], block = &all;
                kernel(args...);
                block->arrive_and_drop();
            });
        for (std::thread& one : running) one.join();
    }
}

}  // namespace clone_fast

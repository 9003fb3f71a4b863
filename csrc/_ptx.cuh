// Instructions that several kernels use and C++ has no name for, one function each.
#pragma once

#include "launch.cuh"

namespace clone_fast {

__device__ __forceinline__ std::uint32_t shared_address(const void* pointer) {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// value within [-limit, limit]. Unlike fminf and fmaxf it keeps NaN, as torch.clamp does.
__device__ __forceinline__ float limited(float value, float limit) {
#if __CUDA_ARCH__ >= 800
    asm("min.NaN.f32 %0, %0, %1;" : "+f"(value) : "f"(limit));
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(value) : "f"(-limit));
    return value;
#else
    return value > limit ? limit : value < -limit ? -limit : value;
#endif
}

// Two numbers of 16 bits, each between those of low and high; NaN stays. Rounding does not change an order, so numbers
// may be rounded before they are limited, where the limit is rounded, too.
template <typename T>
__device__ __forceinline__ std::uint32_t limited_pair(std::uint32_t pair, std::uint32_t low, std::uint32_t high) {
#if __CUDA_ARCH__ >= 800
    if constexpr (std::is_same_v<T, Bfloat>) {
        asm("min.NaN.bf16x2 %0, %0, %1;" : "+r"(pair) : "r"(high));
        asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(pair) : "r"(low));
    } else {
        asm("min.NaN.f16x2 %0, %0, %1;" : "+r"(pair) : "r"(high));
        asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(pair) : "r"(low));
    }
    return pair;
#else
    float numbers[kLanes<T>], limits[kLanes<T>];
    unpack<T>(make_uint4(pair, 0, 0, 0), numbers), unpack<T>(make_uint4(low, high, 0, 0), limits);
    for (int i = 0; i < 2; ++i) {
        if (numbers[i] < limits[i]) numbers[i] = limits[i];
        if (numbers[i] > limits[2 + i]) numbers[i] = limits[2 + i];
    }
    return pack_pair<T>(numbers[0], numbers[1]);
#endif
}

// Barriers among some of a block's threads: each thread either waits at it or only reports that it has come.
__device__ __forceinline__ void barrier_wait(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void barrier_arrive(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// What this thread wrote to shared memory becomes visible to wgmma and to copies by TMA (after the next barrier, of all
// threads' writes). Compute capability 9.0, as all that follows.
__device__ __forceinline__ void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// wgmma, of four warps: what is multiplied between fence and commit is done when at most kPending later ones are not.
__device__ __forceinline__ void group_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void group_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void group_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

}  // namespace clone_fast

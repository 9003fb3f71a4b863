// What the launchers share: errors as exceptions, dtype tags as templates, 16-byte accesses, conversions, reductions.
//
// Everything computes in float32, whatever the tensors hold, and rounds once when it is stored.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "dtype.h"

namespace clone_fast {

using Half = __half;
using Bfloat = __nv_bfloat16;

// ---- host: errors, dispatch, the device -------------------------------------------------------------------------

[[noreturn]] inline void fail(const char* op, const std::string& what) {
    throw std::runtime_error(std::string(op) + ": " + what);
}

inline void check(cudaError_t status, const char* op) {
    if (status != cudaSuccess) fail(op, std::string("CUDA error: ") + cudaGetErrorString(status));
}

// After every <<<>>>: a launch that the driver refused becomes an exception that names the op.
inline void check_launch(const char* op) { check(cudaGetLastError(), op); }

template <typename T>
struct Tag {
    using type = T;
};

// with_dtype(dtype, "upfirdn2d", [&](auto tag) { using T = typename decltype(tag)::type; ... });
template <typename Function>
void with_dtype(Dtype dtype, const char* op, Function&& function) {
    switch (dtype) {
        case Dtype::float32: return function(Tag<float>{});
        case Dtype::float16: return function(Tag<Half>{});
        case Dtype::bfloat16: return function(Tag<Bfloat>{});
    }
    fail(op, "unknown dtype tag " + std::to_string(static_cast<int>(dtype)));
}

// with_flag(clamped, [&](auto flag) { kernel<flag.value><<<...>>>(...); });
template <typename Function>
void with_flag(bool flag, Function&& function) {
    if (flag) function(std::true_type{});
    else function(std::false_type{});
}

inline int device_attribute(cudaDeviceAttr attribute, const char* op) {
    int device = 0, value = 0;
    check(cudaGetDevice(&device), op);
    check(cudaDeviceGetAttribute(&value, attribute, device), op);
    return value;
}

inline int multiprocessors(const char* op) { return device_attribute(cudaDevAttrMultiProcessorCount, op); }

// 90 on an H100 or H200: what a launcher asks before it calls into a file *_sm90a.cu.
inline int compute_capability(const char* op) {
    return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor, op) +
           device_attribute(cudaDevAttrComputeCapabilityMinor, op);
}

// More than 48 KB of dynamic shared memory has to be asked for, once for each kernel.
template <typename Kernel>
void allow_shared_memory(Kernel* kernel, int bytes, const char* op) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
          op);
}

// Whether the kernel that runs was compiled for Hopper or newer: only then its code knows clusters and waits for the
// kernel before (wait_for_previous), whatever the GPU is.
template <typename Kernel>
bool is_for_hopper(Kernel* kernel, const char* op) {
    cudaFuncAttributes attributes = {};
    check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)), op);
    return compute_capability(op) >= 90 && attributes.ptxVersion >= 90;
}

// kernel<<<blocks, threads, shared, stream>>>(args...) of a kernel that begins with wait_for_previous: it is on its way
// while the kernel before still runs, where the GPU can.
template <typename... Parameters, typename... Args>
void launch_early(const char* op, void (*kernel)(Parameters...), dim3 blocks, int threads, int shared,
                  cudaStream_t stream, const Args&... args) {
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = blocks, config.blockDim = dim3(threads), config.dynamicSmemBytes = shared;
    config.stream = stream, config.attrs = &early, config.numAttrs = is_for_hopper(kernel, op);
    check(cudaLaunchKernelEx(&config, kernel, args...), op);
}

template <typename A, typename B>
__host__ __device__ constexpr auto ceil_div(A a, B b) {
    return (a + b - 1) / b;
}

inline bool is_aligned(const void* pointer, int bytes = 16) {
    return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

// ---- host and device: division by a number that is known at launch ------------------------------------------------

// n / divisor and n % divisor for 0 <= n < 2^31 by one multiplication (Granlund and Montgomery, PLDI 1994).
struct Divider {
    std::uint32_t divisor = 1, multiplier = 0, shift = 0;

    Divider() = default;
    explicit Divider(std::int64_t value) : divisor(static_cast<std::uint32_t>(value)) {
        while ((std::uint64_t{1} << shift) < divisor) ++shift;
        multiplier = static_cast<std::uint32_t>(
            ((std::uint64_t{1} << 32) * ((std::uint64_t{1} << shift) - divisor)) / divisor + 1);
    }

    __device__ __forceinline__ std::uint32_t divide(std::uint32_t n) const {
        return (__umulhi(n, multiplier) + n) >> shift;
    }
    __device__ __forceinline__ std::uint32_t divide(std::uint32_t n, std::uint32_t& rest) const {
        const std::uint32_t quotient = divide(n);
        rest = n - quotient * divisor;
        return quotient;
    }
};

// ---- device: conversions ------------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(Half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(Bfloat x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x) {
    if constexpr (std::is_same_v<T, Half>) return __float2half_rn(x);
    else if constexpr (std::is_same_v<T, Bfloat>) return __float2bfloat16_rn(x);
    else return x;
}

// ---- device: 16-byte accesses ---------------------------------------------------------------------------------------

// How many elements of T are 16 bytes: what one thread moves in one instruction.
template <typename T>
inline constexpr int kLanes = 16 / static_cast<int>(sizeof(T));

// 16 bytes as they lie in memory. load16 and store16 want addresses that are multiples of 16.
using Bytes16 = uint4;

template <typename T>
__device__ __forceinline__ Bytes16 load16(const T* from) {
    return *reinterpret_cast<const Bytes16*>(from);
}
// Read once by the whole grid: goes through the caches without staying.
template <typename T>
__device__ __forceinline__ Bytes16 load16_streaming(const T* from) {
    return __ldcs(reinterpret_cast<const Bytes16*>(from));
}
template <typename T>
__device__ __forceinline__ void store16(T* to, Bytes16 bytes) {
    *reinterpret_cast<Bytes16*>(to) = bytes;
}
template <typename T>
__device__ __forceinline__ void store16_streaming(T* to, Bytes16 bytes) {
    __stcs(reinterpret_cast<Bytes16*>(to), bytes);
}

// The kLanes<T> numbers of 16 bytes.
template <typename T>
__device__ __forceinline__ void unpack(Bytes16 bytes, float (&values)[kLanes<T>]) {
    const std::uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (std::is_same_v<T, float>) {
            values[i] = __uint_as_float(words[i]);
        } else if constexpr (std::is_same_v<T, Bfloat>) {  // the upper half of a float32
            values[2 * i] = __uint_as_float(words[i] << 16);
            values[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
        } else {
            const __half2_raw raw{static_cast<unsigned short>(words[i] & 0xffffu),
                                  static_cast<unsigned short>(words[i] >> 16)};
            const float2 pair = __half22float2(__half2(raw));
            values[2 * i] = pair.x;
            values[2 * i + 1] = pair.y;
        }
    }
}

template <typename T>
__device__ __forceinline__ std::uint32_t pack_pair(float low, float high) {
    if constexpr (std::is_same_v<T, Bfloat>) {
        const __nv_bfloat162_raw raw = __floats2bfloat162_rn(low, high);
        return raw.x | static_cast<std::uint32_t>(raw.y) << 16;
    } else {
        const __half2_raw raw = __floats2half2_rn(low, high);
        return raw.x | static_cast<std::uint32_t>(raw.y) << 16;
    }
}

template <typename T>
__device__ __forceinline__ Bytes16 pack(const float (&values)[kLanes<T>]) {
    std::uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (std::is_same_v<T, float>) words[i] = __float_as_uint(values[i]);
        else words[i] = pack_pair<T>(values[2 * i], values[2 * i + 1]);
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

// ---- device: programmatic dependent launch --------------------------------------------------------------------------

// A kernel that was launched with cudaLaunchAttributeProgrammaticStreamSerialization may begin while the one before it
// on the stream, anybody's, still runs. Behind this that one is done, and what it wrote can be read: nothing is read or
// written before.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Blocks of the kernel behind may begin, once all blocks of this one have said so or are done.
__device__ __forceinline__ void let_next_come() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- device: sums -------------------------------------------------------------------------------------------------

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}

// The sum over a block of kThreads, valid in thread 0. Every thread calls it; ends with no barrier of its own, so a
// second call in one kernel needs a __syncthreads() between.
template <int kThreads>
__device__ __forceinline__ float block_sum(float value) {
    __shared__ float partial[kThreads / 32];
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
    __syncthreads();
    if (threadIdx.x < 32) value = warp_sum(threadIdx.x < kThreads / 32 ? partial[threadIdx.x] : 0.0f);
    return value;
}

}  // namespace clone_fast

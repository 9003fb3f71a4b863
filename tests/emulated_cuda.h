// As much of CUDA as the files of tests/emulated.py ask for, on a CPU: blocks one after the other, a thread for each of
// their threads. Stands in for cuda_runtime.h, cuda_fp16.h and cuda_bf16.h.
#pragma once

#include <algorithm>
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

using std::max;
using std::memcpy;
using std::min;

struct float2 {
    float x, y;
};
struct float4 {
    float x, y, z, w;
};
struct uint4 {
    std::uint32_t x, y, z, w;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(std::uint32_t x, std::uint32_t y, std::uint32_t z, std::uint32_t w) { return {x, y, z, w}; }

// ---- a thread's own -------------------------------------------------------------------------------------------------

inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline int __ffs(unsigned x) { return x ? __builtin_ctz(x) + 1 : 0; }
inline std::uint32_t __umulhi(std::uint32_t a, std::uint32_t b) { return std::uint64_t{a} * b >> 32; }
inline float __uint_as_float(std::uint32_t x) {
    float y;
    memcpy(&y, &x, 4);
    return y;
}
inline std::uint32_t __float_as_uint(float x) {
    std::uint32_t y;
    memcpy(&y, &x, 4);
    return y;
}
template <typename T>
T __ldg(const T* from) {
    return *from;
}
template <typename T>
T __ldcs(const T* from) {
    return *from;
}
template <typename T>
void __stcs(T* to, T value) {
    *to = value;
}

struct __half {
    std::uint16_t bits;
};
struct __nv_bfloat16 {
    std::uint16_t bits;
};
inline float __half2float(__half x) {
    const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
    const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                                      : std::ldexp(float(fraction + (exponent ? 1024 : 0)), max(exponent, 1) - 25);
    return x.bits >> 15 ? -size : size;
}
inline __half __float2half_rn(float x) {
    const int sign = std::signbit(x) << 15;
    if (std::isnan(x)) return {0x7fff};
    if (std::fabs(x) >= 65520) return {std::uint16_t(sign | 0x7c00)};
    const int exponent = x == 0 ? -14 : max(std::ilogb(x), -14);
    return {std::uint16_t(sign | (exponent + 14) << 10) + int(std::nearbyint(std::ldexp(std::fabs(x), 10 - exponent)))};
}
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(std::uint32_t{x.bits} << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    const std::uint32_t bits = __float_as_uint(x);
    return {std::uint16_t(std::isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
struct __half2_raw {
    std::uint16_t x, y;
};
using __half2 = __half2_raw;
struct __nv_bfloat162_raw {
    std::uint16_t x, y;
};
using __nv_bfloat162 = __nv_bfloat162_raw;
inline float2 __half22float2(__half2 pair) { return {__half2float({pair.x}), __half2float({pair.y})}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x).bits, __float2half_rn(y).bits}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {__float2bfloat16_rn(x).bits, __float2bfloat16_rn(y).bits};
}

// ---- threads with one another ---------------------------------------------------------------------------------------

struct Warp {
    std::barrier<> arrived{32};
    std::uint32_t values[32];
};
inline thread_local dim3 threadIdx, blockIdx, gridDim;
inline thread_local Warp* warp;
inline thread_local std::barrier<>* block;

constexpr unsigned kSharedBytes = 228 * 1024;
alignas(16) inline unsigned char dynamic_shared[kSharedBytes];  // of a block; what it did not write is NaN
inline unsigned shared_bytes;                                   // that it asked for
inline std::atomic<bool> beyond;                                // whether it went past them

inline std::size_t __cvta_generic_to_shared(const void* at) {
    return static_cast<const unsigned char*>(at) - dynamic_shared;
}
inline void* shared_pointer(std::uint32_t at, unsigned bytes) {
    if (at + bytes <= shared_bytes) return dynamic_shared + at;
    beyond = true;
    return dynamic_shared;
}

inline void __syncthreads() { block->arrive_and_wait(); }

// What `read` makes of the values that the 32 threads bring.
template <typename T, typename Read>
auto exchanged(T value, Read read) {
    static_assert(sizeof(T) == 4);
    memcpy(&warp->values[threadIdx.x % 32], &value, 4);
    warp->arrived.arrive_and_wait();
    T values[32];
    memcpy(values, warp->values, sizeof(values));
    warp->arrived.arrive_and_wait();
    return read(values);
}
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
    return exchanged(value, [&](const T* values) { return values[lane % 32]; });
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return exchanged(value, [&](const T* values) { return values[threadIdx.x % 32 ^ mask]; });
}
inline unsigned __ballot_sync(unsigned, int value) {
    return exchanged(value, [](const int* values) {
        unsigned bits = 0;
        for (int i = 0; i < 32; ++i) bits |= unsigned(values[i] != 0) << i;
        return bits;
    });
}
inline bool __all_sync(unsigned, int value) { return __ballot_sync(~0u, value) == ~0u; }

// ---- the host's side ------------------------------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorIllegalAddress };
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount,
    cudaDevAttrComputeCapabilityMajor,
    cudaDevAttrComputeCapabilityMinor
};
enum { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaFuncAttributes {
    int ptxVersion;
};
struct cudaLaunchAttribute {
    int id;
    struct {
        int programmaticStreamSerializationAllowed;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    unsigned dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    int numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t) { return "past the end of shared memory"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 8, cudaSuccess; }
inline cudaError_t cudaFuncSetAttribute(const void*, int, int) { return cudaSuccess; }
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, int) {
    return *blocks = 1, cudaSuccess;
}

template <typename... Parameters, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), const Args&... args) {
    const dim3 grid = config->gridDim;
    const int threads = config->blockDim.x;
    shared_bytes = config->dynamicSmemBytes, beyond = shared_bytes > kSharedBytes;
    for (unsigned i = 0; i < grid.x * grid.y * grid.z && !beyond; ++i) {
        std::fill(dynamic_shared, dynamic_shared + shared_bytes, 0xff);
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
    return beyond ? cudaErrorIllegalAddress : cudaSuccess;
}

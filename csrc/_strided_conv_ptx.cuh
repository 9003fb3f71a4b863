// The instructions of compute capability 9.0 that the strided convolution is made of, beside those of _tma.cuh and
// _ptx.cuh: copies of weights, products of four warps.
#pragma once

#include "_ptx.cuh"
#include "_tma.cuh"

namespace clone_fast::strided {

// A box of weights, see weight_map.
__device__ __forceinline__ void load_weights(std::uint32_t to, const CUtensorMap& map, Gate gate, int c, int row) {
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
                 "[%1, {%2, %3, %3, %3, %4}], [%5];" ::"r"(to), "l"(&map), "r"(c), "r"(0), "r"(row),
                 "r"(gate.address)
                 : "memory");
}

// A matrix in shared memory, the terms of a row side by side, 64 of them (or 32) in 128 (64) bytes whose units of 16
// bytes are permuted by the address. `pitch`: bytes from 8 rows to the next 8.
struct Matrix {
    std::uint32_t low, high;
    __device__ __forceinline__ Matrix(std::uint32_t address, int pitch, int row_bytes)
        : low(address >> 4 | 1u << 16), high(pitch >> 4 | (row_bytes == 128 ? 1u : 2u) << 30) {}
};

#define CLONE_FAST_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define CLONE_FAST_16(i) CLONE_FAST_4(i), CLONE_FAST_4(i + 4), CLONE_FAST_4(i + 8), CLONE_FAST_4(i + 12)
#define CLONE_FAST_WGMMA_32(types) \
    asm volatile("{.reg .pred p; .reg .b64 a, b; setp.ne.b32 p, %20, 0; mov.b64 a, {%16, %17}; "                       \
                 "mov.b64 b, {%18, %19}; wgmma.mma_async.sync.aligned.m64n32k16.f32." types " {"                       \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"                                \
                 "}, a, b, p, 1, 1, 0, 0;}"                                                                            \
                 : CLONE_FAST_16(0)                                                                                    \
                 : "r"(a.low), "r"(a.high), "r"(b.low), "r"(b.high), "r"(add))
#define CLONE_FAST_WGMMA_64(types) \
    asm volatile("{.reg .pred p; .reg .b64 a, b; setp.ne.b32 p, %36, 0; mov.b64 a, {%32, %33}; "                       \
                 "mov.b64 b, {%34, %35}; wgmma.mma_async.sync.aligned.m64n64k16.f32." types " {"                       \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "          \
                 "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"                                          \
                 "}, a, b, p, 1, 1, 0, 0;}"                                                                            \
                 : CLONE_FAST_16(0), CLONE_FAST_16(16)                                                                 \
                 : "r"(a.low), "r"(a.high), "r"(b.low), "r"(b.high), "r"(add))
#define CLONE_FAST_WGMMA_128(types) \
    asm volatile("{.reg .pred p; .reg .b64 a, b; setp.ne.b32 p, %68, 0; mov.b64 a, {%64, %65}; "                       \
                 "mov.b64 b, {%66, %67}; wgmma.mma_async.sync.aligned.m64n128k16.f32." types " {"                      \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "          \
                 "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, "          \
                 "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "          \
                 "%56, %57, %58, %59, %60, %61, %62, %63"                                                              \
                 "}, a, b, p, 1, 1, 0, 0;}"                                                                            \
                 : CLONE_FAST_16(0), CLONE_FAST_16(16), CLONE_FAST_16(32), CLONE_FAST_16(48)                           \
                 : "r"(a.low), "r"(a.high), "r"(b.low), "r"(b.high), "r"(add))
// d += a b, or d = a b where `add` is 0: 64 rows x kN columns, 16 terms.
template <typename T, int kN>
__device__ __forceinline__ void group_multiply_add(float* d, Matrix a, Matrix b, int add) {
    constexpr bool kHalf = std::is_same_v<T, Half>;
    if constexpr (kN == 32 && kHalf) CLONE_FAST_WGMMA_32("f16.f16");
    if constexpr (kN == 32 && !kHalf) CLONE_FAST_WGMMA_32("bf16.bf16");
    if constexpr (kN == 64 && kHalf) CLONE_FAST_WGMMA_64("f16.f16");
    if constexpr (kN == 64 && !kHalf) CLONE_FAST_WGMMA_64("bf16.bf16");
    if constexpr (kN == 128 && kHalf) CLONE_FAST_WGMMA_128("f16.f16");
    if constexpr (kN == 128 && !kHalf) CLONE_FAST_WGMMA_128("bf16.bf16");
}

#undef CLONE_FAST_4
#undef CLONE_FAST_16
#undef CLONE_FAST_WGMMA_32
#undef CLONE_FAST_WGMMA_64
#undef CLONE_FAST_WGMMA_128

}  // namespace clone_fast::strided

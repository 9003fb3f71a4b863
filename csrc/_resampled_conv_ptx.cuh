// The instructions of compute capability 9.0 that the resampled convolution is made of beside those of _ptx.cuh, one function each.
#pragma once

#include "_ptx.cuh"

namespace clone_fast::resampled {

// threadIdx.x, not shared with any other use of it.
__device__ __forceinline__ int read_thread() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}

// 16 bytes from device to shared memory; zeros where not `inside`, and then `from` is not read.
__device__ __forceinline__ void copy_async(std::uint32_t to, const void* from, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ uint4 load_shared16(std::uint32_t from) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(from)
                 : "memory");
    return v;
}
__device__ __forceinline__ void store_shared16(std::uint32_t to, uint4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

// Four 8 x 8 matrices, lane l giving the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_matrices(std::uint32_t to, std::uint32_t a, std::uint32_t b, std::uint32_t c,
                                               std::uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c),
                 "r"(d)
                 : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(std::uint32_t (&to)[4], std::uint32_t from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
}

#define CLONE_FAST_MMA_16(types)                                                                                 \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." types ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "      \
        "{%0, %1, %2, %3};"                                                                                      \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                         \
        : "r"(a[0]), "r"(a[1]), "r"(next_a[0]), "r"(next_a[1]), "r"(b), "r"(next_b))
#define CLONE_FAST_MMA_8(types)                                                                                  \
    asm("mma.sync.aligned.m16n8k8.row.col.f32." types ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"  \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                         \
        : "r"(a[0]), "r"(a[1]), "r"(b))

// d += a b: 16 rows x 8 columns of a warp, 16 terms in two halves, or 8.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const std::uint32_t (&a)[2],
                                             const std::uint32_t (&next_a)[2], std::uint32_t b, std::uint32_t next_b) {
    if constexpr (std::is_same_v<T, Half>) CLONE_FAST_MMA_16("f16.f16");
    else CLONE_FAST_MMA_16("bf16.bf16");
}
template <typename T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const std::uint32_t (&a)[2], std::uint32_t b) {
    if constexpr (std::is_same_v<T, Half>) CLONE_FAST_MMA_8("f16.f16");
    else CLONE_FAST_MMA_8("bf16.bf16");
}

#undef CLONE_FAST_MMA_16
#undef CLONE_FAST_MMA_8

// A matrix in shared memory without swizzle: 8 rows x 16 bytes lie together in 128 bytes, the next 8 rows follow, the
// next 16 bytes of the same rows are `pitch` bytes away. Two halves of a descriptor; units of 16 bytes may be added
// to the lower one.
struct Matrix {
    std::uint32_t low, high;
    __device__ __forceinline__ Matrix(std::uint32_t address, std::uint32_t pitch)
        : low(address >> 4 | pitch >> 4 << 16), high(128 >> 4) {}
};

#define CLONE_FAST_D8(i)                                                                                        \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define CLONE_FAST_WGMMA(types)                                                                      \
    asm volatile("{.reg .pred p; .reg .b64 a, b; setp.ne.b32 p, %36, 0; mov.b64 a, {%32, %33}; "     \
                 "mov.b64 b, {%34, %35}; wgmma.mma_async.sync.aligned.m64n64k16.f32." types          \
                 " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, " \
                 "a, b, p, 1, 1, 0, 0;}"                                                             \
                 : CLONE_FAST_D8(0), CLONE_FAST_D8(8), CLONE_FAST_D8(16), CLONE_FAST_D8(24)          \
                 : "r"(a.low + a_unit), "r"(a.high), "r"(b.low + b_unit), "r"(b.high), "r"(add))

// d += a b, or d = a b where `add` is 0, with the matrices from unit a_unit and b_unit on: 64 rows, 16 of each warp,
// x 64 columns, 16 terms.
template <typename T>
__device__ __forceinline__ void group_multiply_add(float (&d)[32], Matrix a, int a_unit, Matrix b, int b_unit,
                                                   int add) {
    if constexpr (std::is_same_v<T, Half>) CLONE_FAST_WGMMA("f16.f16");
    else CLONE_FAST_WGMMA("bf16.bf16");
}

#undef CLONE_FAST_D8
#undef CLONE_FAST_WGMMA

}  // namespace clone_fast::resampled

// The instructions of upfirdn2d's fast kernels beside those of _ptx.cuh, one function each.
#pragma once

#include "_ptx.cuh"

namespace clone_fast::fir {

// To shared memory, past the L1; zeros where not `real`, and then nothing is read.
__device__ __forceinline__ void copy16_async(std::uint32_t to, const void* from, bool real) {
    asm volatile(
        "{ .reg .pred skip; setp.eq.u32 skip, %2, 0;"
        " cp.async.cg.shared.global.L2::128B [%0], [%1], 16, skip; }" ::"r"(to),
        "l"(from), "r"(static_cast<std::uint32_t>(real))
        : "memory");
}
// What this thread has copied since the last time is a group. And: of its groups at most kPending are on their way.
__device__ __forceinline__ void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ Bytes16 load_shared16(std::uint32_t from) {
    Bytes16 bytes;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(bytes.x), "=r"(bytes.y), "=r"(bytes.z), "=r"(bytes.w)
                 : "r"(from)
                 : "memory");
    return bytes;
}
__device__ __forceinline__ void store_shared16(std::uint32_t to, Bytes16 bytes) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(bytes.x), "r"(bytes.y), "r"(bytes.z),
                 "r"(bytes.w)
                 : "memory");
}

// value where `seen` is above zero, else value * slope. As the compiler writes it, it takes one instruction more.
__device__ __forceinline__ float sloped(float value, float seen, float slope) {
    asm("{ .reg .pred above; setp.gt.f32 above, %1, 0f00000000; @!above mul.f32 %0, %0, %2; }"
        : "+f"(value)
        : "f"(seen), "f"(slope));
    return value;
}

// Of two numbers of 16 bits: all bits set of each that is within [-limit, limit], none of another, nor of NaN.
template <typename T>
__device__ __forceinline__ std::uint32_t pair_within(std::uint32_t pair, std::uint32_t limit) {
    using Pair = std::conditional_t<std::is_same_v<T, Bfloat>, __nv_bfloat162, __half2>;
    Pair numbers, most;
    memcpy(&numbers, &pair, sizeof(pair)), memcpy(&most, &limit, sizeof(limit));
    return __hle2_mask(__habs2(numbers), most);
}

}  // namespace clone_fast::fir

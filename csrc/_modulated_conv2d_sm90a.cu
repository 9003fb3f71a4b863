// The 3x3 convolution of few channels on wgmma (compute capability 9.0): the same tile, the same registers, but four
// warps share one instruction, which takes the weights straight from shared memory. More than 32 channels on both sides
// have a kernel of their own, _modulated_conv2d_held_sm90a.cu.
#include "_modulated_conv2d_tile.cuh"

namespace clone_fast {
namespace conv3x3 {

#define CLONE_FAST_SUMS(j) "+f"(sums[j][0]), "+f"(sums[j][1]), "+f"(sums[j][2]), "+f"(sums[j][3])
#define CLONE_FAST_WGMMA_32(types)                                                                         \
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32." types                                       \
                 " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "               \
                 "{%16, %17, %18, %19}, %20, 1, 1, 1, 0;"                                                  \
                 : CLONE_FAST_SUMS(0), CLONE_FAST_SUMS(1), CLONE_FAST_SUMS(2), CLONE_FAST_SUMS(3)          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define CLONE_FAST_WGMMA_64(types)                                                                         \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." types                                       \
                 " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "       \
                 "{%32, %33, %34, %35}, %36, 1, 1, 1, 0;"                                                  \
                 : CLONE_FAST_SUMS(0), CLONE_FAST_SUMS(1), CLONE_FAST_SUMS(2), CLONE_FAST_SUMS(3),         \
                   CLONE_FAST_SUMS(4), CLONE_FAST_SUMS(5), CLONE_FAST_SUMS(6), CLONE_FAST_SUMS(7)          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

// 64 pixels, 16 of each warp, x 16 channels times 16 channels x all output channels.
template <typename T, int kOut>
__device__ __forceinline__ void group_multiply_add(float (&sums)[kOut / 8][4], const std::uint32_t (&a)[4],
                                                   std::uint64_t b) {
    if constexpr (kOut == 32 && std::is_same_v<T, Half>) CLONE_FAST_WGMMA_32("f16.f16");
    if constexpr (kOut == 32 && std::is_same_v<T, Bfloat>) CLONE_FAST_WGMMA_32("bf16.bf16");
    if constexpr (kOut == 64 && std::is_same_v<T, Half>) CLONE_FAST_WGMMA_64("f16.f16");
    if constexpr (kOut == 64 && std::is_same_v<T, Bfloat>) CLONE_FAST_WGMMA_64("bf16.bf16");
}

#undef CLONE_FAST_SUMS
#undef CLONE_FAST_WGMMA_32
#undef CLONE_FAST_WGMMA_64

template <typename T, int kIn, int kOut>
struct GroupEngine {
    using L = Layout<kIn, kOut>;

    // The weights were written by ordinary stores and cp.async; wgmma reads them through the asynchronous proxy.
    static __device__ __forceinline__ void publish() { clone_fast::publish(); }

    // While the tensor cores work with one matrix of the input, the next is there and the one after it on its way.
    static __device__ __forceinline__ void multiply(Accumulators<kOut>& sums,
                                                    const std::uint32_t (&rows)[kWarpRows + 2],
                                                    const std::uint32_t (&taps)[3], std::uint32_t weights, int) {
        constexpr int kLines = kWarpRows + 2, kTotal = kIn / 16 * 3 * kLines;
        // No swizzle: 8 output channels x 16 bytes lie together; 128 bytes to the next 8, a pitch to the next chunk.
        const std::uint64_t matrix = (weights >> 4) | static_cast<std::uint64_t>(L::kWeightPitch) << 16 |
                                     static_cast<std::uint64_t>(128 / kUnit) << 32;
        const auto matrix_at = [&](int n) {  // row n % kLines, column shift, 16 channels
            return rows[n % kLines] + (taps[n / kLines % 3] ^ n / (kLines * 3) * 2 * kUnit);
        };
        std::uint32_t a[3][4];
        load_matrices(a[0], matrix_at(0));
        load_matrices(a[1], matrix_at(1));
#pragma unroll
        for (int n = 0; n < kTotal; ++n) {
            const int i = n % kLines, dx = n / kLines % 3, k = n / (kLines * 3);
            group_fence();
#pragma unroll
            for (int dy = 0; dy < 3; ++dy) {
                const int row = i - dy;
                if (row < 0 || row >= kWarpRows) continue;
                const int unit = ((dy * 3 + dx) * L::kChunks + k * 2) * L::kWeightPitch;
                group_multiply_add<T, kOut>(sums[row], a[n % 3], matrix + unit);
            }
            group_commit();
            if (n + 2 >= kTotal) continue;
            group_wait<1>();  // the matrix before this one is no longer read
            load_matrices(a[(n + 2) % 3], matrix_at(n + 2));
        }
        group_wait<0>();
    }
};

}  // namespace conv3x3

void modulated_conv2d_3x3_sm90a(const Conv3x3& op, cudaStream_t stream) {
    conv3x3::dispatch<conv3x3::GroupEngine, false>(op, stream);
}

}  // namespace clone_fast

// The weight gradient of the 3x3 convolution of 64 or 32 channels on wgmma (compute capability 9.0): one warp copies
// tiles of a and b, three groups of four warps hold the sums of one column tap each, from the first tile to the last.
// See _modulated_conv2d_partials.cuh for what becomes of the partial sums.
//
// The long dimension of the product is the pixels: 16 neighbours of a row at a time. The left operand is b, 64 rows:
// its 64 channels, or 32 channels of two image rows. The right one is a, shifted by a column tap: its channels of three
// image rows, one for each row tap, or of four; the rows of an image are as far from each other in shared memory as
// the hardware is told. What meets of 32 channels in rows too far apart is computed and left.
#include "_modulated_conv2d_load.cuh"
#include "_modulated_conv2d_partials.cuh"
#include "_tma.cuh"

namespace clone_fast {
namespace conv3x3 {

constexpr int kProductThreads = 3 * 128, kAllThreads = kProductThreads + 32;

template <int kChannels>
struct Product {
    static constexpr int kTileRows = 4, kTileCols = 64, kPixel = 2 * kChannels;
    static constexpr int kWide = kTileCols + 2;  // with the columns beside it
    static constexpr int kAcross = 64 / kChannels;  // image rows of the left operand
    static constexpr int kAlong = kAcross + 2, kN = kAlong * kChannels;  // of the right one; its columns
    static constexpr int kBytesB = kTileRows * kTileCols * kPixel, kBytesA = (kTileRows + 2) * kWide * kPixel;
    static constexpr int kLoadBytes = kBytesA + kBytesB, kStageBytes = (kLoadBytes + 1023) / 1024 * 1024;
    static constexpr int kStages = kChannels == 64 ? 2 : 5;
    static constexpr int kBarriers = kStages * kStageBytes, kBytes = kBarriers + 2 * kStages * 8;

    // Bytes from the start of a stage, for image row `row` of the tile and the 16 pixels k.
    static constexpr __device__ int left(int row, int k) { return (row * kTileCols + 16 * k) * kPixel; }
    static constexpr __device__ int right(int row, int k, int dx) {
        return kBytesB + (row * kWide + 16 * k + dx) * kPixel;
    }
    // Of a descriptor: to the next image row, to the next 8 pixels, the permutation of the units.
    static constexpr unsigned kLeftLow = static_cast<unsigned>(kTileCols * kPixel / 16) << 16;
    static constexpr unsigned kRightLow = static_cast<unsigned>(kWide * kPixel / 16) << 16;
    static constexpr unsigned kHigh = 8 * kPixel / 16 | (kChannels == 64 ? 1u : 2u) << 30;
};

#define CLONE_FAST_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define CLONE_FAST_16(i) CLONE_FAST_4(i), CLONE_FAST_4(i + 4), CLONE_FAST_4(i + 8), CLONE_FAST_4(i + 12)
#define CLONE_FAST_WGMMA_T192(types)                                                                          \
    asm volatile("{.reg .b64 a, b; mov.b64 a, {%96, %97}; mov.b64 b, {%98, %99}; "                            \
                 "wgmma.mma_async.sync.aligned.m64n192k16.f32." types " {"                                    \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
                 "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, " \
                 "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, " \
                 "%56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, " \
                 "%74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, " \
                 "%92, %93, %94, %95"                                                                         \
                 "}, a, b, 1, 1, 1, 1, 1;}"                                                                   \
                 : CLONE_FAST_16(0), CLONE_FAST_16(16), CLONE_FAST_16(32), CLONE_FAST_16(48),                 \
                   CLONE_FAST_16(64), CLONE_FAST_16(80)                                                       \
                 : "r"(a_low), "r"(high), "r"(b_low), "r"(high))
#define CLONE_FAST_WGMMA_T128(types)                                                                          \
    asm volatile("{.reg .b64 a, b; mov.b64 a, {%64, %65}; mov.b64 b, {%66, %67}; "                            \
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." types " {"                                    \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
                 "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, " \
                 "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, " \
                 "%56, %57, %58, %59, %60, %61, %62, %63"                                                     \
                 "}, a, b, 1, 1, 1, 1, 1;}"                                                                   \
                 : CLONE_FAST_16(0), CLONE_FAST_16(16), CLONE_FAST_16(32), CLONE_FAST_16(48)                  \
                 : "r"(a_low), "r"(high), "r"(b_low), "r"(high))

// d += a b, both from shared memory with the channels side by side: 64 rows, 16 pixels.
template <typename T, int kN>
__device__ __forceinline__ void product_add(float (&d)[kN / 2], std::uint32_t a_low, std::uint32_t b_low,
                                            std::uint32_t high) {
    if constexpr (kN == 192 && std::is_same_v<T, Half>) CLONE_FAST_WGMMA_T192("f16.f16");
    if constexpr (kN == 192 && std::is_same_v<T, Bfloat>) CLONE_FAST_WGMMA_T192("bf16.bf16");
    if constexpr (kN == 128 && std::is_same_v<T, Half>) CLONE_FAST_WGMMA_T128("f16.f16");
    if constexpr (kN == 128 && std::is_same_v<T, Bfloat>) CLONE_FAST_WGMMA_T128("bf16.bf16");
}

#undef CLONE_FAST_4
#undef CLONE_FAST_16
#undef CLONE_FAST_WGMMA_T192
#undef CLONE_FAST_WGMMA_T128

template <typename T, int kChannels>
__global__ void __launch_bounds__(kAllThreads, 1)
    conv3x3_product_kernel(const __grid_constant__ Conv3x3Wgrad op, const __grid_constant__ CUtensorMap map_a,
                           const __grid_constant__ CUtensorMap map_b) {
    using P = Product<kChannels>;
    extern __shared__ __align__(1024) unsigned char product_memory[];
    const std::uint32_t base = shared_address(product_memory);
    const auto full = [&](int stage) { return Gate{base + P::kBarriers + stage % P::kStages * 8}; };
    const auto empty = [&](int stage) { return Gate{base + P::kBarriers + (P::kStages + stage % P::kStages) * 8}; };
    const auto phase = [](int stage) { return stage / P::kStages % 2; };
    const int lane = threadIdx.x % 32, warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);

    const int steps = ceil_div(op.height, P::kTileRows), strips = ceil_div(op.width, P::kTileCols);
    const int samples = op.n / op.results, result = blockIdx.x / op.partials, part = blockIdx.x % op.partials;
    const std::int64_t all = static_cast<std::int64_t>(samples) * strips * steps;
    const int first = static_cast<int>(part * all / op.partials);
    const int count = static_cast<int>((part + 1) * all / op.partials) - first;

    if (threadIdx.x == 0) {
        for (int stage = 0; stage < P::kStages; ++stage) {
            full(stage).open(1);
            empty(stage).open(kProductThreads / 32);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();

    if (warp == kProductThreads / 32) {
        if (lane > 0) return;
        for (int i = 0; i < count; ++i) {
            const int tile = first + i, x = tile / steps % strips * P::kTileCols, y = tile % steps * P::kTileRows;
            const int sample = result * samples + tile / steps / strips;
            const std::uint32_t to = base + i % P::kStages * P::kStageBytes;
            if (i >= P::kStages) empty(i).wait(phase(i - P::kStages));
            full(i).expect(P::kLoadBytes);
            load_box(to, map_b, full(i), 0, x, y, sample);
            load_box(to + P::kBytesB, map_a, full(i), 0, x - 1, y - 1, sample);
        }
        return;
    }

    const int dx = warp / 4;
    float sums[P::kN / 2] = {};
    for (int i = 0; i < count; ++i) {
        full(i).wait(phase(i));
        const std::uint32_t stage = (base + i % P::kStages * P::kStageBytes) >> 4;
        const std::uint32_t shifted = stage + dx * P::kPixel / 16;
#pragma unroll
        for (int row = 0; row < P::kTileRows; row += P::kAcross) {
            group_fence();
#pragma unroll
            for (int k = 0; k < P::kTileCols / 16; ++k) {
                product_add<T, P::kN>(sums, stage + (P::left(row, k) / 16 | P::kLeftLow),
                                      shifted + (P::right(row, k, 0) / 16 | P::kRightLow), P::kHigh);
            }
            group_commit();
            if (row > 0 || i == 0) continue;
            group_wait<1>();  // the stage before this one has been read
            if (lane == 0) empty(i - 1).arrive(1);
        }
    }
    group_wait<0>();

    using Order = HeldOrder<kChannels>;
    float4* to = reinterpret_cast<float4*>(op.partial) + static_cast<std::int64_t>(blockIdx.x) * Order::kVectors;
    const int thread = threadIdx.x % 128;
    if constexpr (P::kAcross == 1) {
#pragma unroll
        for (int i = 0; i < P::kN / 8; ++i) {
            to[Order::vector(i, dx, thread)] =
                make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]);
        }
    } else {  // rows of the second image row meet every row tap one later: they are added to those of the first
        barrier_wait(1, kProductThreads);  // all have multiplied
        constexpr int kOf = kChannels / 8;  // of four numbers, in an image row
        float4* shared = reinterpret_cast<float4*>(product_memory) + dx * 3 * kOf * 64 + thread % 64;
        if (thread >= 64) {
#pragma unroll
            for (int i = 0; i < 3 * kOf; ++i) {
                const float* sum = sums + 4 * (i + kOf);
                shared[i * 64] = make_float4(sum[0], sum[1], sum[2], sum[3]);
            }
        }
        barrier_wait(1, kProductThreads);
        if (thread >= 64) return;
#pragma unroll
        for (int i = 0; i < 3 * kOf; ++i) {
            const float* sum = sums + 4 * i;
            const float4 other = shared[i * 64];
            to[Order::vector(i, dx, thread)] =
                make_float4(sum[0] + other.x, sum[1] + other.y, sum[2] + other.z, sum[3] + other.w);
        }
    }
}

template <typename T, int kChannels>
void launch_product(const Conv3x3Wgrad& op, cudaStream_t stream) {
    using P = Product<kChannels>;
    static_assert(P::kBytes <= 227 << 10);
    const auto kernel = conv3x3_product_kernel<T, kChannels>;
    allow_shared_memory(kernel, P::kBytes, "modulated_conv2d");
    const auto map = [&](const void* x, int channels, int rows, int columns) {
        return image_map<T>(x, op.n, op.height, op.width, channels, kChannels, rows, columns);
    };
    kernel<<<op.results * op.partials, kAllThreads, P::kBytes, stream>>>(
        op, map(op.a, op.channels_a, P::kTileRows + 2, P::kWide), map(op.b, op.channels_b, P::kTileRows, P::kTileCols));
    check_launch("modulated_conv2d");
    add_partials<HeldOrder<kChannels>>(op, stream);
}

}  // namespace conv3x3

void modulated_conv2d_3x3_wgrad_sm90a(const Conv3x3Wgrad& op, cudaStream_t stream) {
    using namespace conv3x3;
    with_flag(op.dtype == Dtype::float16, [&](auto is_half) {
        using T = std::conditional_t<decltype(is_half)::value, Half, Bfloat>;
        if (op.channels_a > 32) launch_product<T, 64>(op, stream);
        else launch_product<T, 32>(op, stream);
    });
}

}  // namespace clone_fast

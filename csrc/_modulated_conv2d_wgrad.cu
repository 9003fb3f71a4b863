// The weight gradient of the 3x3 convolution (stride 1, padding 1) of at most 64 channels:
//
//     r[cb, ca, dy, dx] = sum over pixels p of b[cb, p] * a[ca, p + (dy, dx) - 1]
//
// a matrix product whose long dimension is the pixels, on mma.sync (_modulated_conv2d_wgrad_sm90a.cu has it on wgmma
// where both sides have up to 32 channels or both have more). Blocks walk down strips of the image as in
// _modulated_conv2d_tile.cuh, a with its halo and b in shared memory, each read from device memory once. A warp holds
// the nine taps of 32 x 16 channels in registers from the first pixel of its walk to the last: for 64 x 64 channels the
// eight warps of a block share the channels, for fewer also the columns of a strip. Blocks leave partial sums, which a
// second kernel adds in a fixed order.
#include "_modulated_conv2d_load.cuh"
#include "_modulated_conv2d_partials.cuh"

namespace clone_fast {
namespace conv3x3 {

template <int kA, int kB>
struct Walk {
    static constexpr int kCols = kA > 32 || kB > 32 ? 32 : 64;
    using InputA = Ring<kA / 8, kCols + 2, kHaloRing>;
    using InputB = Ring<kB / 8, kCols, 2 * kRows>;
    static constexpr int kTasks = kA / 16 * (kB / 32);  // warps that share the pixels
    static constexpr int kGroups = kThreads / 32 / kTasks;  // of such warps, each with columns of its own
    static constexpr int kGroupCols = kCols / kGroups;
    static constexpr int kSums = 9 * kA * kB;
    static constexpr int kTileBytes = InputA::kBytes + InputB::kBytes, kAddBytes = kGroups / 2 * kSums * 4;
    static constexpr int kBytes = kTileBytes > kAddBytes ? kTileBytes : kAddBytes;
    static_assert(kGroupCols % 16 == 0);
};

using WarpSums = float[3][3][2][2][4];  // dy, dx, 16 channels of b, 8 channels of a, and what a lane holds of a matrix

// One step: kRows rows of b, 16 columns at a time. A row of a meets the three rows of b around it.
template <typename T, typename W>
__device__ __forceinline__ void multiply_step(WarpSums& sums, std::uint32_t a, std::uint32_t b, int slot_a, int slot_b,
                                              int first_a, int first_b, int group, int lane) {
    const int column = group * W::kGroupCols + lane % 8;
    std::uint32_t taps[3];
#pragma unroll
    for (int dx = 0; dx < 3; ++dx) {
        taps[dx] = a + W::InputA::offset(column + lane / 8 % 2 * 8 + dx, first_a / 8 + lane / 16);
    }
    b += slot_b * W::InputB::kRowBytes + W::InputB::offset(column + lane / 16 * 8, first_b / 8 + lane / 8 % 2);
#pragma unroll 1
    for (int block = 0; block < W::kGroupCols / 16; ++block) {
        std::uint32_t left[3][2][4];
#pragma unroll
        for (int i = 0; i < kRows + 2; ++i) {
            if (i < kRows) {
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    load_matrices_transposed(left[i % 3][m], (b + i * W::InputB::kRowBytes) ^ m * 2 * kUnit);
                }
            }
            const int row = W::InputA::row(slot_a + i) * W::InputA::kRowBytes + block * 16 * W::InputA::kChunks * kUnit;
#pragma unroll
            for (int dx = 0; dx < 3; ++dx) {
                std::uint32_t right[4];
                load_matrices_transposed(right, taps[dx] + row);
#pragma unroll
                for (int dy = 0; dy < 3; ++dy) {
                    const int from = i - dy;
                    if (from < 0 || from >= kRows) continue;
#pragma unroll
                    for (int m = 0; m < 2; ++m) {
                        multiply_add<T>(sums[dy][dx][m][0], left[from % 3][m], right[0], right[1]);
                        multiply_add<T>(sums[dy][dx][m][1], left[from % 3][m], right[2], right[3]);
                    }
                }
            }
        }
        b += 16 * W::InputB::kChunks * kUnit;
    }
}

// Calls visit(place among [9][kB][kA], pair of sums) for all that a lane holds.
template <int kA, int kB, typename Visit>
__device__ __forceinline__ void each_pair(WarpSums& sums, int first_a, int first_b, int lane, Visit&& visit) {
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
            for (int n = 0; n < 2; ++n) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int cb = first_b + m * 16 + half * 8 + lane / 4, ca = first_a + n * 8 + lane % 4 * 2;
                    float* pair = sums[tap / 3][tap % 3][m][n] + 2 * half;
                    visit((tap * kB + cb) * kA + ca, pair[0], pair[1]);
                }
            }
        }
    }
}

template <typename T, int kA, int kB>
__global__ void __launch_bounds__(kThreads, 1) conv3x3_wgrad_kernel(const __grid_constant__ Conv3x3Wgrad op) {
    using W = Walk<kA, kB>;
    if constexpr (W::kBytes > kMostSharedMemory) return;
    extern __shared__ __align__(128) unsigned char memory[];
    const std::uint32_t tile_a = shared_address(memory), tile_b = tile_a + W::InputA::kBytes;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, task = warp % W::kTasks, group = warp / W::kTasks;
    const int first_b = task % (kB / 32) * 32, first_a = task / (kB / 32) * 16;

    const int steps = ceil_div(op.height, kRows), strips = ceil_div(op.width, W::kCols);
    const int samples = op.n / op.results, result = blockIdx.x / op.partials, part = blockIdx.x % op.partials;
    const std::int64_t tiles = static_cast<std::int64_t>(samples) * strips * steps;
    const int last = static_cast<int>((part + 1) * tiles / op.partials);
    int tile = static_cast<int>(part * tiles / op.partials);
    int step = tile % steps, strip = tile / steps % strips, sample = result * samples + tile / steps / strips;
    int slot_a = 0, slot_b = 0;
    bool ahead = false;  // whether the rows of the tile are there or on their way

    WarpSums sums = {};
    for (; tile < last; ++tile) {
        const int y0 = step * kRows, x0 = strip * W::kCols;
        const Image<T> a(op.a, sample, op.height, op.width, op.channels_a);
        const Image<T> b(op.b, sample, op.height, op.width, op.channels_b);
        if (!ahead) {
            __syncthreads();  // all have read what is overwritten now
            slot_a = slot_b = 0;
            load_halo_rows<typename W::InputA, kRows + 2>(a, x0, y0 - 1, 0, tile_a);
            load_rows<typename W::InputB, kRows, W::kCols>(b, x0, y0, 0, tile_b);
        }
        copy_async_wait();
        __syncthreads();  // the rows of this step are there, and nobody reads those of the one before
        ahead = step + 1 < steps && tile + 1 < last;
        if (ahead) {
            const int next = W::InputA::row(slot_a + kRows + 2);
            load_halo_rows<typename W::InputA, kRows>(a, x0, y0 + kRows + 1, next, tile_a);
            load_rows<typename W::InputB, kRows, W::kCols>(b, x0, y0 + kRows, slot_b ^ kRows, tile_b);
        }
        multiply_step<T, W>(sums, tile_a, tile_b, slot_a, slot_b, first_a, first_b, group, lane);
        slot_a = W::InputA::row(slot_a + kRows);
        slot_b ^= kRows;
        if (++step == steps) {
            step = 0;
            if (++strip == strips) {
                strip = 0;
                ++sample;
            }
        }
    }

    float* shared = reinterpret_cast<float*>(memory);
    const int spread = lane / 4 % 4 * 8;  // the rows that a warp writes at once, over the banks
#pragma unroll 1
    for (int half = W::kGroups / 2; half > 0; half /= 2) {  // the groups above give their sums to those below
        __syncthreads();
        if (group >= half && group < 2 * half) {
            float* to = shared + (group - half) * W::kSums;
            each_pair<kA, kB>(sums, first_a, first_b, lane, [&](int place, float& low, float& high) {
                *reinterpret_cast<float2*>(to + (place ^ spread)) = make_float2(low, high);
            });
        }
        __syncthreads();
        if (group < half) {
            const float* from = shared + group * W::kSums;
            each_pair<kA, kB>(sums, first_a, first_b, lane, [&](int place, float& low, float& high) {
                const float2 pair = *reinterpret_cast<const float2*>(from + (place ^ spread));
                low += pair.x;
                high += pair.y;
            });
        }
    }
    if (group > 0) return;
    float* to = op.partial + static_cast<std::int64_t>(blockIdx.x) * 9 * op.channels_b * op.channels_a;
    each_pair<kA, kB>(sums, first_a, first_b, lane, [&](int place, float& low, float& high) {
        const int ca = place % kA, cb = place / kA % kB, tap = place / (kA * kB);
        if (ca >= op.channels_a || cb >= op.channels_b) return;
        *reinterpret_cast<float2*>(to + (tap * op.channels_b + cb) * op.channels_a + ca) = make_float2(low, high);
    });
}

template <typename T, int kA, int kB>
void launch_wgrad(const Conv3x3Wgrad& op, cudaStream_t stream) {
    using W = Walk<kA, kB>;
    const auto kernel = conv3x3_wgrad_kernel<T, kA, kB>;
    allow_shared_memory(kernel, W::kBytes, "modulated_conv2d");
    kernel<<<op.results * op.partials, kThreads, W::kBytes, stream>>>(op);
    check_launch("modulated_conv2d");
    add_partials<PlainOrder>(op, stream);
}

}  // namespace conv3x3

bool modulated_conv2d_3x3_wgrad_fits(int device, int channels_a, int channels_b) {
    using namespace conv3x3;
    const bool wide = channels_a > 32 || channels_b > 32;
    return device_fits(device, wide ? Walk<64, 64>::kBytes : Walk<32, 32>::kBytes);
}

int modulated_conv2d_3x3_wgrad_floats(int channels_a, int channels_b) {
    const auto padded = [](int channels) { return channels > 32 ? 64 : 32; };
    return 9 * padded(channels_a) * padded(channels_b);
}

int modulated_conv2d_3x3_wgrad_partials(int n, int height, int width, int results) {
    const std::int64_t steps = static_cast<std::int64_t>(n / results) * ceil_div(height, conv3x3::kRows);
    const std::int64_t tiles = steps * ceil_div(width, 64);
    const std::int64_t blocks = multiprocessors("modulated_conv2d") / results;
    return static_cast<int>(blocks < 1 ? 1 : tiles < blocks ? tiles : blocks);
}

void modulated_conv2d_3x3_wgrad(const Conv3x3Wgrad& op, cudaStream_t stream) {
    using namespace conv3x3;
    if (op.channels_a > 64 || op.channels_b > 64) fail("modulated_conv2d", "more than 64 channels");
    if (op.dtype == Dtype::float32) fail("modulated_conv2d", "float32");
    const bool alike = (op.channels_a > 32) == (op.channels_b > 32);
    if (alike && !op.portable && compute_capability("modulated_conv2d") == 90) {
        return modulated_conv2d_3x3_wgrad_sm90a(op, stream);
    }
    with_flag(op.dtype == Dtype::float16, [&](auto is_half) {
        using T = std::conditional_t<decltype(is_half)::value, Half, Bfloat>;
        with_flag(op.channels_a > 32, [&](auto wide_a) {
            with_flag(op.channels_b > 32, [&](auto wide_b) {
                launch_wgrad<T, decltype(wide_a)::value ? 64 : 32, decltype(wide_b)::value ? 64 : 32>(op, stream);
            });
        });
    });
}

}  // namespace clone_fast

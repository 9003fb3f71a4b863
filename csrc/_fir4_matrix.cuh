// The 4x4 filter as a matrix that tensor cores multiply by (compute capability 9.0, half precision, channels_last):
// that takes a quarter of the instructions of the same sums on the arithmetic units.
//
// A warp makes patches: 4 x 4 filtered pixels of 32 channels, the product of a constant matrix and the 7 x 7 pixels
// that they depend on. It walks down, four rows at a step, and keeps the last three rows that it has seen in registers.
#pragma once

#include "_resampled_conv_ptx.cuh"

namespace clone_fast::resampled {

constexpr int kPatch = 4, kPatchChannels = 32;
constexpr int kWindow = 2 * kPatch - 1;

// high + low are the taps to twice the precision of T; what is multiplied by zeros must be finite: a number that is not
// spreads to all 16 pixels. [row of the 7][output row 0 or 1, 2 or 3]
struct TapMatrix {
    std::uint32_t high[kWindow][2], low[kWindow][2];
    bool exact;  // low is zero: so it is for the usual filters, whose taps are small integers over a power of two
};

// `rank` 1: [4] of a separable filter, else [4, 4]. As a convolution, which reverses it, unless `flip`.
__device__ __forceinline__ float tap_of(const float* filter, int rank, bool flip, int row, int column) {
    if (!flip) row = kPatch - 1 - row, column = kPatch - 1 - column;
    return rank == 1 ? filter[row] * filter[column] : filter[row * kPatch + column];
}

template <typename T>
__device__ __forceinline__ TapMatrix load_tap_matrix(const float* filter, int rank, bool flip, float gain, int lane) {
    TapMatrix taps;
    bool exact = true;
#pragma unroll
    for (int r = 0; r < kWindow; ++r) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float high[2], low[2];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int row = r - (lane / 16 + 2 * h), column = lane % 4 * 2 + e - lane / 4 % 4;
                float tap = 0.0f;
                if (row >= 0 && row < kPatch && column >= 0 && column < kPatch) {
                    tap = gain * tap_of(filter, rank, flip, row, column);
                }
                high[e] = to_float(from_float<T>(tap));
                low[e] = tap - high[e];
                if (to_float(from_float<T>(low[e])) != 0.0f) exact = false;
            }
            taps.high[r][h] = pack_pair<T>(high[0], high[1]);
            taps.low[r][h] = pack_pair<T>(low[0], low[1]);
        }
    }
    taps.exact = __all_sync(0xffffffffu, exact);
    return taps;
}

// sums[i]: channels 8i + 2q, + 1 of pixel lane / 4 and of pixel lane / 4 + 8, with q = lane % 4; from the 7 rows b.
template <typename T>
__device__ __forceinline__ void multiply_patch(float (&sums)[4][4], const TapMatrix& taps,
                                               const std::uint32_t (&b)[kWindow][4]) {
    const auto multiply_all = [&](const std::uint32_t (&a)[kWindow][2]) {
#pragma unroll
        for (int k = 0; k < kWindow - 1; k += 2) {
#pragma unroll
            for (int i = 0; i < 4; ++i) multiply_add<T>(sums[i], a[k], a[k + 1], b[k][i], b[k + 1][i]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) multiply_add<T>(sums[i], a[kWindow - 1], b[kWindow - 1][i]);
    };
    multiply_all(taps.high);
    if (!taps.exact) multiply_all(taps.low);
}

// Brings an image to a ring of stages in shared memory, four rows each: [row][column][chunk of 8 channels, swizzled].
template <typename T, int kChunks, int kThreads, int kStages>
struct Input {
    static constexpr int kColumns = 16 * kPatch + kPatch - 1, kPitch = kColumns + 1;  // in pixels
    static constexpr int kPixel = kChunks * 16, kStage = kPatch * kPitch * kPixel;
    static constexpr int kSpan = kThreads / kChunks;  // columns of one pass
    static_assert(kSpan % 8 == 0 && kStage % 128 == 0);  // so that all columns of a thread have one swizzle

    const T* from;
    std::uint32_t to;
    int y, x, column, height, width, channels, stage = 0;

    // From the pixel (y, x), which may lie outside, of an image that begins at `image`, with a stride of `channels`.
    __device__ __forceinline__ Input(const T* image, int height, int width, int channels, int y, int x,
                                     std::uint32_t ring, int thread)
        : y(y), x(x + thread / kChunks), column(thread / kChunks), height(height), width(width), channels(channels) {
        const int chunk = thread % kChunks;
        from = image + (static_cast<std::int64_t>(y) * width + this->x) * channels + chunk * 8;
        to = ring + place(column, chunk);
    }
    // Neither 8 neighbouring pixels of a chunk nor the chunks of a pixel share a bank.
    __device__ __forceinline__ static int place(int column, int chunk) {
        return column * kPixel + (chunk ^ (kChunks == 8 ? column & 7 : column >> 1 & 3)) * 16;
    }
    __device__ __forceinline__ void next() {
#pragma unroll
        for (int row = 0; row < kPatch; ++row) {
#pragma unroll
            for (int i = 0; i < kColumns; i += kSpan) {
                if (i + kSpan > kColumns && column + i >= kColumns) continue;
                const bool inside = static_cast<unsigned>(y + row) < static_cast<unsigned>(height) &&
                                    static_cast<unsigned>(x + i) < static_cast<unsigned>(width);
                copy_async(to + stage * kStage + (row * kPitch + i) * kPixel, from + (row * width + i) * channels,
                           inside);
            }
        }
        copy_async_commit();
        stage = stage + 1 == kStages ? 0 : stage + 1;
        y += kPatch;
        from += kPatch * width * channels;
    }
    // Where lane `lane` of warp `warp` reads the first row of its first patch, of four that are 16 columns apart.
    __device__ __forceinline__ static int patch_of(int warp, int lane) {  // chunk lane / 8 of pixels 0 ... 6
        return place(kPatch * (warp % 4) + min(lane % 8, kWindow - 1), warp / 4 * 4 + lane / 8);
    }
    // The rows of patch n: those kept of the step before, and four new ones, of which the last three are kept.
    __device__ __forceinline__ static void fetch(std::uint32_t (&b)[kWindow][4], std::uint32_t (&kept)[kPatch - 1][4],
                                                 std::uint32_t from, int n) {
#pragma unroll
        for (int r = 0; r < kWindow; ++r) {
            if (r >= kPatch - 1) {
                load_matrices_transposed(b[r], from + ((r - kPatch + 1) * kPitch + 4 * kPatch * n) * kPixel);
                continue;
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) b[r][i] = kept[r][i];
        }
#pragma unroll
        for (int r = 0; r < kPatch - 1; ++r) {
#pragma unroll
            for (int i = 0; i < 4; ++i) kept[r][i] = b[r + kPatch][i];
        }
    }
};

}  // namespace clone_fast::resampled

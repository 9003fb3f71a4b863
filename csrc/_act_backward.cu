// A thread keeps its 16 bytes of channels and goes down the pixels, so that all sums over pixels wait in its registers.
// What the formula reads lies together in memory; several pixels' loads of a thread are under way at once.
#include "_act_backward.h"

#include <algorithm>

#include "launch.cuh"

namespace clone_fast {
namespace {

constexpr const char* kOp = "modulated_conv2d";
constexpr int kThreads = 256, kBlocks = 2;  // on a multiprocessor
constexpr int kFewest = 2;                  // steps of a thread at least: a block also has sums to write

// Pixels whose numbers a thread asks for at once: as many as its registers have room for.
template <typename T, int kFew>
constexpr int kAhead = kFew > 0 && sizeof(T) == 2 ? 2 : 4;

// Sums over the rows of a block, of several kinds at once: to[kind][c], each what the threads of a column hold together.
template <typename T, int kKinds>
__device__ __forceinline__ void add_rows(const float (&sums)[kKinds][kLanes<T>], float* const (&to)[kKinds], int row,
                                         int rows, int column, int width) {
    __shared__ float spare[kKinds][kThreads * kLanes<T>];
    if (row < rows) {
#pragma unroll
        for (int k = 0; k < kKinds; ++k) {
#pragma unroll
            for (int i = 0; i < kLanes<T>; ++i) spare[k][row * width + column * kLanes<T> + i] = sums[k][i];
        }
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kKinds; ++k) {  // neighbouring kinds go to other threads
        for (int c = (threadIdx.x + k * width) % kThreads; c < width; c += kThreads) {
            if (to[k] == nullptr) continue;
            float total = 0.0f;
#pragma unroll 8
            for (int r = 0; r < rows; ++r) total += spare[k][r * width + c];
            to[k][c] = total;
        }
    }
}

// The sums over a block of several numbers of each thread, by its first threads.
template <int kKinds>
__device__ __forceinline__ void add_all(const float (&sums)[kKinds], float* const (&to)[kKinds]) {
    __shared__ float spare[kKinds][kThreads / 32];
#pragma unroll
    for (int k = 0; k < kKinds; ++k) {
        const float sum = warp_sum(sums[k]);
        if (threadIdx.x % 32 == 0) spare[k][threadIdx.x / 32] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kKinds; ++k) {
        if (threadIdx.x != k || to[k] == nullptr) continue;
        float total = 0.0f;
        for (const float sum : spare[k]) total += sum;
        *to[k] = total;
    }
}

template <typename T, int kFew, bool kHasDy, bool kDots>
__global__ void __launch_bounds__(kThreads, kBlocks) act_backward_kernel(const __grid_constant__ ActBackward op) {
    constexpr int kWide = kLanes<T>, kSteps = kAhead<T, kFew>;
    const int vectors = op.channels / kWide, rows = kThreads / vectors;
    const int row = threadIdx.x / vectors, column = threadIdx.x - row * vectors;
    const int n = blockIdx.x / op.shares, share = blockIdx.x - n * op.shares;
    let_next_come();
    wait_for_previous();

    // what the pixels add up to: for the bias, the image's weights, the dots; for the strength, the image's bias
    float wide[1 + kFew + kDots][kWide] = {}, single[1 + kFew] = {}, w[kFew > 0 ? kFew : 1][kWide];
    if constexpr (kFew > 0) {
        const T* from = static_cast<const T*>(op.w) + n * op.w_n + column * kWide * op.w_c;
#pragma unroll
        for (int f = 0; f < kFew; ++f) {
#pragma unroll
            for (int i = 0; i < kWide; ++i) w[f][i] = row < rows ? to_float(from[f * op.w_f + i * op.w_c]) : 0.0f;
        }
    }
    const float strength = kDots && op.strength != nullptr ? to_float(*static_cast<const T*>(op.strength)) : 1.0f;

    const std::int64_t sample = static_cast<std::int64_t>(n) * op.pixels;
    const std::int64_t first = sample * op.channels + column * kWide;
    const T *dy = static_cast<const T*>(op.dy) + first, *y = static_cast<const T*>(op.y) + first;
    const T* dimage = static_cast<const T*>(op.dimage) + sample * kFew;
    const T* drawn = op.image == nullptr ? nullptr : static_cast<const T*>(op.image) + sample * kFew;
    const T* noise = op.noise == nullptr ? nullptr : static_cast<const T*>(op.noise) + n * op.noise_stride;
    T* g = static_cast<T*>(op.g) + first;
    const int stride = op.shares * rows, begin = row < rows ? share * rows + row : op.pixels;
    for (int p = begin; p < op.pixels; p += kSteps * stride) {
        Bytes16 seen[kSteps], came[kSteps];
        float colours[kSteps][kFew > 0 ? kFew : 1], level[kSteps];
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
            const int at = p + s * stride;
            const bool inside = at < op.pixels;
            const std::int64_t offset = static_cast<std::int64_t>(at) * op.channels;
            seen[s] = came[s] = make_uint4(0, 0, 0, 0), level[s] = 0.0f;
            if (inside) seen[s] = load16(y + offset);
            if constexpr (kHasDy) {
                if (inside) came[s] = load16(dy + offset);
            }
#pragma unroll
            for (int f = 0; f < kFew; ++f) {
                colours[s][f] = inside ? to_float(dimage[at * op.image_pixel + f * op.image_channel]) : 0.0f;
                if (drawn != nullptr && inside) {
                    const float colour = to_float(drawn[at * op.drawn_pixel + f * op.drawn_channel]);
                    colours[s][f] = fabsf(colour) < op.image_clamp ? colours[s][f] : 0.0f;
                }
            }
            if (noise != nullptr && inside) level[s] = to_float(noise[at]);
        }
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
            float value[kWide], z[kWide], of_pixel = 0.0f;
            unpack<T>(seen[s], z);
            unpack<T>(came[s], value);
#pragma unroll
            for (int i = 0; i < kWide; ++i) {
#pragma unroll
                for (int f = 0; f < kFew; ++f) {
                    value[i] = fmaf(colours[s][f], w[f][i], value[i]);
                    wide[1 + f][i] = fmaf(colours[s][f], z[i], wide[1 + f][i]);
                }
                const bool open = !(fabsf(z[i]) >= op.clamp);
                const float whole = value[i];
                value[i] *= z[i] > 0.0f ? op.positive : op.negative;
                value[i] = open ? value[i] : 0.0f;
                wide[0][i] += value[i];
                if constexpr (kDots) {
                    float& dot = wide[1 + kFew][i];
                    dot = fmaf(open ? whole : 0.0f, z[i], dot);
                    dot = fmaf(-value[i], level[s] * strength, dot);
                }
                of_pixel += value[i];
            }
            single[0] = fmaf(of_pixel, level[s], single[0]);
#pragma unroll
            for (int f = 0; f < kFew; ++f) single[1 + f] += colours[s][f];
            const int at = p + s * stride;
            if (at < op.pixels) store16(g + static_cast<std::int64_t>(at) * op.channels, pack<T>(value));
        }
    }

    const std::size_t place = blockIdx.x;
    float *wide_to[1 + kFew + kDots] = {}, *single_to[1 + kFew] = {};
    if (op.bias_sums != nullptr) wide_to[0] = op.bias_sums + place * op.channels;
    if (op.strength_sums != nullptr) single_to[0] = op.strength_sums + place;
#pragma unroll
    for (int f = 0; f < kFew; ++f) {
        if (op.w_sums != nullptr) wide_to[1 + f] = op.w_sums + (place * kFew + f) * op.channels;
        if (op.dimage_sums != nullptr) single_to[1 + f] = op.dimage_sums + place * kFew + f;
        if (column != 0) single[1 + f] = 0.0f;  // one of those that have seen a pixel
    }
    if constexpr (kDots) {
        wide_to[1 + kFew] = op.dots + place * op.channels;
        if (op.bias != nullptr && row < rows) {  // what is left of the sum: the same factor in every pixel
            const T* bias = static_cast<const T*>(op.bias) + column * kWide;
#pragma unroll
            for (int i = 0; i < kWide; ++i) {
                wide[1 + kFew][i] = fmaf(-to_float(bias[i]), wide[0][i], wide[1 + kFew][i]);
            }
        }
    }
    add_rows<T>(wide, wide_to, row, rows, column, op.channels);
    add_all(single, single_to);
}

template <typename T, int kFew, bool kHasDy>
void launch(const ActBackward& op, cudaStream_t stream) {
    with_flag(op.dots != nullptr, [&](auto dots) {
        const auto kernel = act_backward_kernel<T, kFew, kHasDy, decltype(dots)::value>;
        launch_early(kOp, kernel, dim3(op.n * op.shares), kThreads, 0, stream, op);
    });
}

}  // namespace

int act_backward_channels(Dtype dtype) { return kThreads * (dtype == Dtype::float32 ? 4 : 8); }

int act_backward_shares(Dtype dtype, int n, int channels, int pixels) {
    const int rows = act_backward_channels(dtype) / channels;
    const int together = std::max(1, kBlocks * multiprocessors(kOp) / n);
    return std::max(1, std::min(together, pixels / (rows * kFewest)));
}

void act_backward(const ActBackward& op, cudaStream_t stream) {
    with_dtype(op.dtype, kOp, [&](auto tag) {
        using T = typename decltype(tag)::type;
        if (op.channels % kLanes<T> != 0 || op.channels > act_backward_channels(op.dtype)) fail(kOp, "channels fill no vectors");
        if (op.few == 0) return launch<T, 0, true>(op, stream);
        if (op.few != 3) fail(kOp, "an image of three channels, or none");
        with_flag(op.dy != nullptr, [&](auto has_dy) { launch<T, 3, decltype(has_dy)::value>(op, stream); });
    });
}

}  // namespace clone_fast

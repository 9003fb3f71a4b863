// A thread keeps its 16 bytes of channels and goes down the pixels, so that all sums over pixels wait in its registers.
// What the formula reads lies together in memory; several pixels' loads of a thread are under way at once.
#include "_act_backward.h"

#include <algorithm>

#include "launch.cuh"

namespace clone_fast {
namespace {

constexpr const char* kOp = "modulated_conv2d";
constexpr int kThreads = 256, kBlocks = 2;  // on a multiprocessor
constexpr int kFewest = 4;                  // steps of a thread at least: a block also has sums to write


// Pixels whose numbers a thread asks for at once: as many as its registers have room for.
template <typename T, int kFew>
constexpr int kAhead = kFew > 0 && sizeof(T) == 2 ? 2 : 4;

// to[c] = the sum over the rows of a block of what each thread holds for its channels; `spare` has room for all.
template <typename T>
__device__ __forceinline__ void add_rows(const float (&sum)[kLanes<T>], float* spare, int row, int rows, int column,
                                         int width, float* to) {
    __syncthreads();
    if (row < rows) {
#pragma unroll
        for (int i = 0; i < kLanes<T>; ++i) spare[row * width + column * kLanes<T> + i] = sum[i];
    }
    __syncthreads();
    // [rows][width] -> [parts][width] -> [width]
    const int parts = width < kThreads ? kThreads / width : 1, part = width < kThreads ? threadIdx.x / width : 0;
    const int first = width < kThreads ? threadIdx.x - part * width : threadIdx.x;
    float total = 0.0f;
    for (int c = first; c < width && part < parts; c += kThreads) {
        total = 0.0f;
        for (int r = part; r < rows; r += parts) total += spare[r * width + c];
        if (parts == 1) to[c] = total;
    }
    if (parts == 1) return;
    __syncthreads();
    if (part < parts) spare[part * width + first] = total;
    __syncthreads();
    if (part != 0) return;
    for (int p = 1; p < parts; ++p) total += spare[p * width + first];
    to[first] = total;
}

template <typename T, int kFew, bool kHasDy, bool kDots>
__global__ void __launch_bounds__(kThreads, kBlocks) act_backward_kernel(const __grid_constant__ ActBackward op) {
    constexpr int kWide = kLanes<T>, kSteps = kAhead<T, kFew>;
    __shared__ float spare[kThreads * kWide];
    const int vectors = op.channels / kWide, rows = kThreads / vectors;
    const int row = threadIdx.x / vectors, column = threadIdx.x - row * vectors;
    const int n = blockIdx.x / op.shares, share = blockIdx.x - n * op.shares;
    let_next_come();
    wait_for_previous();

    float w[kFew > 0 ? kFew : 1][kWide], to_w[kFew > 0 ? kFew : 1][kWide] = {}, to_image[kFew > 0 ? kFew : 1] = {};
    if constexpr (kFew > 0) {
        const T* from = static_cast<const T*>(op.w) + n * op.w_n + column * kWide * op.w_c;
#pragma unroll
        for (int f = 0; f < kFew; ++f) {
#pragma unroll
            for (int i = 0; i < kWide; ++i) w[f][i] = row < rows ? to_float(from[f * op.w_f + i * op.w_c]) : 0.0f;
        }
    }
    float to_bias[kWide] = {}, to_dots[kWide] = {}, to_strength = 0.0f;
    const float strength = kDots && op.strength != nullptr ? to_float(*static_cast<const T*>(op.strength)) : 1.0f;

    const std::int64_t sample = static_cast<std::int64_t>(n) * op.pixels;
    const std::int64_t first = sample * op.channels + column * kWide;
    const T *dy = static_cast<const T*>(op.dy) + first, *y = static_cast<const T*>(op.y) + first;
    const T* image = static_cast<const T*>(op.dimage) + sample * kFew;
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
                colours[s][f] = inside ? to_float(image[at * op.image_pixel + f * op.image_channel]) : 0.0f;
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
                    to_w[f][i] = fmaf(colours[s][f], z[i], to_w[f][i]);
                }
                const bool open = fabsf(z[i]) < op.clamp;
                const float whole = value[i];
                value[i] *= z[i] > 0.0f ? op.positive : op.negative;
                value[i] = open ? value[i] : 0.0f;
                to_bias[i] += value[i];
                if constexpr (kDots) {
                    to_dots[i] = fmaf(open ? whole : 0.0f, z[i], to_dots[i]);
                    to_dots[i] = fmaf(-value[i], level[s] * strength, to_dots[i]);
                }
                of_pixel += value[i];
            }
            to_strength = fmaf(of_pixel, level[s], to_strength);
#pragma unroll
            for (int f = 0; f < kFew; ++f) to_image[f] += colours[s][f];
            const int at = p + s * stride;
            if (at < op.pixels) store16(g + static_cast<std::int64_t>(at) * op.channels, pack<T>(value));
        }
    }

    const std::size_t place = blockIdx.x;
    const auto write = [&](const float (&sum)[kWide], float* to) {
        add_rows<T>(sum, spare, row, rows, column, op.channels, to);
    };
    if (op.bias_sums != nullptr) write(to_bias, op.bias_sums + place * op.channels);
    if constexpr (kDots) {
        if (op.bias != nullptr && row < rows) {  // what is left of the sum: the same factor in every pixel
            const T* bias = static_cast<const T*>(op.bias) + column * kWide;
#pragma unroll
            for (int i = 0; i < kWide; ++i) to_dots[i] = fmaf(-to_float(bias[i]), to_bias[i], to_dots[i]);
        }
        write(to_dots, op.dots + place * op.channels);
    }
    if constexpr (kFew > 0) {
        if (op.w_sums != nullptr) {
#pragma unroll
            for (int f = 0; f < kFew; ++f) write(to_w[f], op.w_sums + (place * kFew + f) * op.channels);
        }
        if (op.dimage_sums != nullptr) {
#pragma unroll
            for (int f = 0; f < kFew; ++f) {
                __syncthreads();
                const float sum = block_sum<kThreads>(column == 0 ? to_image[f] : 0.0f);
                if (threadIdx.x == 0) op.dimage_sums[place * kFew + f] = sum;
            }
        }
    }
    if (op.strength_sums != nullptr) {
        __syncthreads();
        const float sum = block_sum<kThreads>(to_strength);
        if (threadIdx.x == 0) op.strength_sums[place] = sum;
    }
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

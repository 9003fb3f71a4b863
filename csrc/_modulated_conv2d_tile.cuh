// The 3x3 convolution (stride 1, padding 1) of at most 64 channels, around the matrix instruction that does the work.
//
// A block walks down a strip of the image, 64 pixels wide, 8 rows at a step. The input rows lie in a ring in shared
// memory: while the tensor cores work on the ten rows that a step needs, the eight rows of the next are on their way,
// so every pixel is read from device memory once (but for the two columns beside a strip). The weights of all nine
// taps stay in shared memory for the whole walk. A warp holds 4 rows x 16 pixels x all output channels in registers;
// an input row that it loads serves the three output rows around it.
// The weights lie as [tap][chunk of 8 input channels][output channel]. Within 32 output channels, those that one lane
// will hold of the result are brought together: it then stores 16 bytes with no exchange between lanes.
#pragma once

#include "_modulated_conv2d_drawing.cuh"
#include "modulated_conv2d.h"

namespace clone_fast::conv3x3 {

constexpr int kCols = 64;  // of the tile of 2 x 4 warps
constexpr int kWarpRows = 4;

template <int kIn, int kOut>
struct Layout {
    using Input = Ring<kIn / 8, kCols + 2, kHaloRing>;
    static constexpr int kChunks = kIn / 8;
    static constexpr int kWeightPitch = kOut + 1;
    static constexpr int kWeightBytes = 9 * kChunks * kWeightPitch * kUnit;
    static constexpr int kDrawing = Input::kBytes + kWeightBytes + kOut * 4;  // where its weights begin
    static constexpr int kBytes = kDrawing + sizeof(DrawingWeights<Half, kOut>);
    static constexpr int kBlocks = kIn == 32 && kOut == 32 ? 2 : 1;  // on a multiprocessor
};

// The place of an output channel among the columns of the matrix instruction: lane quarter q holds columns 2q and 2q+1
// of every 8, and they are to be channels 8q .. 8q+7 of every 32.
__device__ __forceinline__ int weight_slot(int channel) {
    return (channel & ~31) + (channel % 8) / 2 * 8 + (channel % 32) / 8 * 2 + channel % 2;
}

// kTogether: the input channels of a tap lie together in memory, and neighbouring lanes read them; otherwise the output
// channels do. Every thread has kBatch units on their way at once.
template <typename T, int kIn, int kOut, bool kTogether>
__device__ __forceinline__ void load_weights(const Conv3x3& op, int sample, std::uint32_t shared) {
    using L = Layout<kIn, kOut>;
    constexpr int kItems = 9 * L::kChunks * kOut, kBatch = kTogether ? 9 : 3;
    const T* weight = static_cast<const T*>(op.weight) + sample * op.wn;
#pragma unroll 1
    for (int first = threadIdx.x; first < kItems; first += kBatch * kThreads) {
        Bytes16 units[kBatch];
        std::uint32_t to[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int item = first + i * kThreads, tap = item / (L::kChunks * kOut);
            const int chunk = kTogether ? item % L::kChunks : item / kOut % L::kChunks;
            const int o = kTogether ? item / L::kChunks % kOut : item % kOut;
            const T* from = weight + o * op.wo + tap / 3 * op.wy + tap % 3 * op.wx + chunk * 8 * op.wi;
            to[i] = shared + ((tap * L::kChunks + chunk) * L::kWeightPitch + weight_slot(o)) * kUnit;
            units[i] = make_uint4(0, 0, 0, 0);
            if (item >= kItems || o >= op.out_channels || chunk * 8 >= op.in_channels) continue;
            if constexpr (kTogether) {
                units[i] = load16(from);
            } else {
                const auto number = [&](int n) -> std::uint32_t {
                    return *reinterpret_cast<const unsigned short*>(from + n * op.wi);
                };
                units[i] = make_uint4(number(0) | number(1) << 16, number(2) | number(3) << 16,
                                      number(4) | number(5) << 16, number(6) | number(7) << 16);
            }
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            if (first + i * kThreads >= kItems) continue;
            asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to[i]), "r"(units[i].x), "r"(units[i].y),
                         "r"(units[i].z), "r"(units[i].w)
                         : "memory");
        }
    }
}

template <int kOut>
using Accumulators = float[kWarpRows][kOut / 8][4];

// The noise of the 4 x 2 pixels of a lane, zeros outside the image: four rows, columns 8 apart.
// Where two blocks share a multiprocessor, one branch around all loads is quickest: they overlap, and the other block
// works while this one waits for them.
template <typename T>
struct Noise {
    float values[kWarpRows][2] = {};

    __device__ __forceinline__ void load(const Conv3x3& op, int sample, int y, int x) {
        const std::int64_t first = sample * op.noise_stride + static_cast<std::int64_t>(y) * op.width + x;
        const auto load = [&](auto from) {
#pragma unroll
            for (int i = 0; i < 2 * kWarpRows; ++i) {
                const int row = i / 2, column = i % 2 * 8;
                const bool inside = y + row < op.height && x + column < op.width;
                values[row][i % 2] = inside ? to_float(from[first + row * op.width + column]) : 0.0f;
            }
        };
        if (op.noise == nullptr) return;
        if (op.noise_float) load(static_cast<const float*>(op.noise));
        else load(static_cast<const T*>(op.noise));
    }
    __device__ __forceinline__ float at(int row, int half, bool) const { return values[row][half]; }
};

// Alone on a multiprocessor, a block must not wait: the loads are predicated, and what they bring stays as it lies in
// memory until it is used, so that they are on their way while the results of the tile before are stored.
template <typename T>
struct LateNoise {
    std::uint32_t words[kWarpRows][2];

    __device__ __forceinline__ void load(const Conv3x3& op, int sample, int y, int x) {
        const std::int64_t first = sample * op.noise_stride + static_cast<std::int64_t>(y) * op.width + x;
        const int bytes = op.noise_float ? 4 : 2;
#pragma unroll
        for (int i = 0; i < 2 * kWarpRows; ++i) {
            const int row = i / 2, column = i % 2 * 8;
            const bool inside = op.noise != nullptr && y + row < op.height && x + column < op.width;
            const char* from = static_cast<const char*>(op.noise) + (first + row * op.width + column) * bytes;
            asm volatile("{\n"
                         ".reg .pred word, half;\n"
                         "setp.eq.s32 word, %2, 4;\n"
                         "setp.eq.s32 half, %2, 2;\n"
                         "mov.b32 %0, 0;\n"
                         "@word ld.global.b32 %0, [%1];\n"
                         "@half ld.global.u16 %0, [%1];\n"
                         "}\n"
                         : "=&r"(words[row][i % 2])
                         : "l"(from), "r"(inside ? bytes : 0));
        }
    }
    __device__ __forceinline__ float at(int row, int half, bool is_float) const {
        const std::uint32_t word = words[row][half];
        if (is_float) return __uint_as_float(word);
        if constexpr (std::is_same_v<T, Bfloat>) return __uint_as_float(word << 16);
        else return to_float(__ushort_as_half(static_cast<unsigned short>(word)));
    }
};

// Noise and bias are in the sum from the start.
template <int kOut, typename AnyNoise>
__device__ __forceinline__ void start(Accumulators<kOut>& sums, const AnyNoise& noise, bool noise_float, float strength,
                                      const float* bias, int lane) {
#pragma unroll
    for (int j = 0; j < kOut / 8; ++j) {
        const int channel = j / 4 * 32 + lane % 4 * 8 + j % 4 * 2;
        const float2 pair = *reinterpret_cast<const float2*>(bias + channel);
#pragma unroll
        for (int row = 0; row < kWarpRows; ++row) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float value = noise.at(row, half, noise_float);
                sums[row][j][2 * half] = fmaf(value, strength, pair.x);
                sums[row][j][2 * half + 1] = fmaf(value, strength, pair.y);
            }
        }
    }
}

template <typename T, int kOut, bool kDraws>
__device__ __forceinline__ void finish(const Conv3x3& op, const Accumulators<kOut>& sums, int sample, int y, int x,
                                       int lane, const DrawingWeights<T, kOut>& drawing) {
    [[maybe_unused]] Bytes16 weights[kOut / 32];  // of the drawing
    [[maybe_unused]] T* rgb = nullptr;
    if constexpr (kDraws) {
#pragma unroll
        for (int group = 0; group < kOut / 32; ++group) {
            weights[group] = load16(&drawing.weight[lane / 8][group * 32 + lane % 4 * 8]);
        }
        const std::int64_t pixels = static_cast<std::int64_t>(op.height) * op.width;
        rgb = static_cast<T*>(op.drawing.rgb) + sample * pixels * op.drawing.channels + lane % 4;
    }
    T* image = static_cast<T*>(op.y) + static_cast<std::int64_t>(sample) * op.height * op.width * op.out_channels;
#pragma unroll
    for (int row = 0; row < kWarpRows; ++row) {
        Bytes16 units[2][kOut / 32];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int px = x + lane / 4 + half * 8;
            const bool inside = y + row < op.height && px < op.width;
            T* pixel = image + ((y + row) * op.width + px) * op.out_channels + lane % 4 * 8;
#pragma unroll
            for (int group = 0; group < kOut / 32; ++group) {
                // where there is no channel, but infinite noise, nothing is to be drawn
                const float limit = kDraws && group * 32 + lane % 4 * 8 >= op.out_channels ? 0.0f : op.clamp;
                float values[8];
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const float sum = sums[row][group * 4 + i / 2][2 * half + i % 2];
                    values[i] = limited(fmaxf(sum * op.positive, sum * op.negative), limit);
                }
                const Bytes16 unit = units[half][group] = pack<T>(values);
                if (inside && group * 32 + lane % 4 * 8 < op.out_channels) {
                    // volatile: otherwise the compiler takes it apart into four stores
                    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(pixel + group * 32), "r"(unit.x),
                                 "r"(unit.y), "r"(unit.z), "r"(unit.w)
                                 : "memory");
                }
            }
        }
        if constexpr (kDraws) {
            float drawn[4] = {};
            draw<T>(drawn, units, weights);
            const int px = x + lane / 4;
            const bool inside = y + row < op.height && lane % 4 < op.drawing.channels;
            store_drawn(op.drawing, rgb + ((y + row) * op.width + px) * op.drawing.channels, drawn,
                        drawing.bias[lane % 4], inside && px < op.width, inside && px + 8 < op.width);
        }
    }
}

// The walk of a block: steps down a strip, strips of a sample, samples.
struct Place {
    int step, strip, sample;

    __device__ __forceinline__ Place(int tile, int steps, int strips)
        : step(tile % steps), strip(tile / steps % strips), sample(tile / steps / strips) {}
    __device__ __forceinline__ void advance(int steps, int strips) {
        if (++step < steps) return;
        step = 0;
        if (++strip < strips) return;
        strip = 0;
        ++sample;
    }
};

// Engine<T, kIn, kOut>::multiply adds the nine taps to the sums of one warp.
template <typename T, int kIn, int kOut, template <typename, int, int> class Engine, bool kDraws>
__global__ void __launch_bounds__(kThreads, Layout<kIn, kOut>::kBlocks)
    conv3x3_kernel(const __grid_constant__ Conv3x3 op) {
    using L = Layout<kIn, kOut>;
    using Input = typename L::Input;
    if constexpr (L::kBytes > kMostSharedMemory) return;
    extern __shared__ __align__(128) unsigned char memory[];
    const std::uint32_t input = shared_address(memory), weights = input + Input::kBytes;
    float* bias = reinterpret_cast<float*>(memory + Input::kBytes + L::kWeightBytes);
    auto& drawing = *reinterpret_cast<DrawingWeights<T, kOut>*>(memory + L::kDrawing);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int warp_row = warp / 4 * kWarpRows, warp_col = warp % 4 * 16;

    const int steps = ceil_div(op.height, kRows), strips = ceil_div(op.width, kCols);
    const std::int64_t tiles = static_cast<std::int64_t>(op.n) * strips * steps;
    const int last = static_cast<int>((blockIdx.x + 1) * tiles / gridDim.x);
    int tile = static_cast<int>(blockIdx.x * tiles / gridDim.x);
    Place at(tile, steps, strips);
    int loaded = -1;  // the sample whose weights are there
    [[maybe_unused]] int drawing_of = -1;  // and of the drawing
    int slot = 0;  // the ring row of the first input row of the tile
    bool ahead = false;  // whether the rows of the tile are there or on their way

    if (threadIdx.x < kOut) {
        const bool inside = op.bias != nullptr && threadIdx.x < op.out_channels;
        bias[threadIdx.x] = inside ? load_number<T>(op.bias, threadIdx.x, op.bias_float) : 0.0f;
    }
    const bool scaled = op.noise != nullptr && op.strength != nullptr;
    const float strength = scaled ? load_number<T>(op.strength, 0, op.strength_float) : 1.0f;
    std::conditional_t<L::kBlocks == 1, LateNoise<T>, Noise<T>> noise;
    const auto load_noise = [&] {
        noise.load(op, at.sample, at.step * kRows + warp_row, at.strip * kCols + warp_col + lane / 4);
    };
    load_noise();

    for (; tile < last; ++tile) {
        const int y0 = at.step * kRows, x0 = at.strip * kCols, sample = at.sample;
        const Image<T> image(op.x, sample, op.height, op.width, op.in_channels);
        if (!ahead) {
            __syncthreads();  // all have read what is overwritten now
            slot = 0;
            load_halo_rows<Input, kRows + 2>(image, x0, y0 - 1, 0, input);
            if (loaded < 0 || (op.wn != 0 && loaded != sample)) {
                if (op.weight_rows) load_weights<T, kIn, kOut, true>(op, sample, weights);
                else load_weights<T, kIn, kOut, false>(op, sample, weights);
                loaded = sample;
            }
            if constexpr (kDraws) {
                if (drawing_of < 0 || (op.drawing.wn != 0 && drawing_of != sample)) load_drawing(op, sample, drawing);
                drawing_of = sample;
            }
        }
        copy_async_wait();
        Engine<T, kIn, kOut>::publish();
        __syncthreads();  // the rows of this step are there, and nobody reads those of the one before

        ahead = at.step + 1 < steps && tile + 1 < last;
        if (ahead) load_halo_rows<Input, kRows>(image, x0, y0 + kRows + 1, Input::row(slot + kRows + 2), input);
        Accumulators<kOut> sums;
        start<kOut>(sums, noise, op.noise_float, strength, bias, lane);
        std::uint32_t rows[kWarpRows + 2], taps[3];  // an input row of the warp; the lane's part of a row
#pragma unroll
        for (int i = 0; i < kWarpRows + 2; ++i) {
            rows[i] = input + Input::row(Input::row(slot + warp_row) + i) * Input::kRowBytes;
        }
#pragma unroll
        for (int dx = 0; dx < 3; ++dx) taps[dx] = Input::offset(warp_col + lane % 16 + dx, lane / 16);
        Engine<T, kIn, kOut>::multiply(sums, rows, taps, weights, lane);

        slot = Input::row(slot + kRows);
        at.advance(steps, strips);
        if (tile + 1 < last) load_noise();
        finish<T, kOut, kDraws>(op, sums, sample, y0 + warp_row, x0 + warp_col, lane, drawing);
    }
}

template <typename T, int kIn, int kOut, template <typename, int, int> class Engine, bool kDraws>
void launch(const Conv3x3& op, cudaStream_t stream) {
    using L = Layout<kIn, kOut>;
    const auto kernel = conv3x3_kernel<T, kIn, kOut, Engine, kDraws>;
    allow_shared_memory(kernel, L::kBytes, "modulated_conv2d");
    const std::int64_t tiles = static_cast<std::int64_t>(op.n) * ceil_div(op.height, kRows) * ceil_div(op.width, kCols);
    const std::int64_t blocks = op.blocks > 0 ? op.blocks : multiprocessors("modulated_conv2d") * L::kBlocks;
    kernel<<<static_cast<unsigned>(tiles < blocks ? tiles : blocks), kThreads, L::kBytes, stream>>>(op);
    check_launch("modulated_conv2d");
}

// Channels up to 32 and up to 64; what is missing to them is zeros in shared memory. kWidest: also 64 to 64.
template <template <typename, int, int> class Engine, bool kWidest>
void dispatch(const Conv3x3& op, cudaStream_t stream) {
    if (op.in_channels > 64 || op.out_channels > 64) fail("modulated_conv2d", "more than 64 channels");
    if (op.dtype == Dtype::float32) fail("modulated_conv2d", "float32");
    with_flag(op.dtype == Dtype::float16, [&](auto is_half) {
        using T = std::conditional_t<decltype(is_half)::value, Half, Bfloat>;
        with_flag(op.in_channels > 32, [&](auto wide_in) {
            with_flag(op.out_channels > 32, [&](auto wide_out) {
                constexpr int kIn = decltype(wide_in)::value ? 64 : 32, kOut = decltype(wide_out)::value ? 64 : 32;
                if constexpr (kWidest || kIn + kOut < 128) {
                    with_flag(op.drawing.channels > 0,
                              [&](auto draws) { launch<T, kIn, kOut, Engine, decltype(draws)::value>(op, stream); });
                }
            });
        });
    });
}

}  // namespace clone_fast::conv3x3

// The part of the upsampling convolution that filters and finishes.
#pragma once

#include "_fir4_matrix.cuh"
#include "_resampled_conv_tile.cuh"

namespace clone_fast::resampled {

template <typename T>
__device__ __forceinline__ void filter(const ResampledConv& op, const Plan& plan, const Segment& segment, int team,
                                       int thread, std::uint32_t fields) {
    constexpr int kTurns = 4;  // of a warp in a step, 4 columns each, 16 columns apart
    const int warp = thread / 32, lane = thread % 32;
    const TapMatrix taps = load_tap_matrix<T>(op.filter, op.filter_rank, false, 4.0f, lane);
    // What this lane fetches: the unit lane / 8 of a field row's pixels 0 ... 6, alternately odd and even columns.
    const int pixel = min(lane % 8, 6), column = 2 * warp + (pixel + 1) / 2;
    const std::uint32_t unit = (pixel + 1) % 2 * kPlane + field_unit(column, lane / 8, pixel % 2 == 0);
    // What it finishes: in rows `row` and row + 2, one column, 8 channels.
    const int row = lane / 16, width = 2 * op.width, height = 2 * op.height;
    const int x = segment.x + 4 * warp + lane / 4 % 4, channel = segment.first_channel + lane % 4 * 8;
    int turns = channel < op.out_channels ? min(ceil_div(width - x, 16), kTurns) : 0;
    if (warp == 3) turns = min(turns, kTurns - 1);  // 15 groups of 4 columns

    float bias[8] = {};
    if (op.bias != nullptr && turns > 0) {
#pragma unroll
        for (int c = 0; c < 8; ++c) bias[c] = load_number<T>(op.bias, channel + c, op.bias_float) * op.gain;
    }
    float strength = op.gain;
    if (op.strength != nullptr) strength *= load_number<T>(op.strength, 0, op.strength_float);
    const std::uint32_t high = pack_pair<T>(op.clamp, op.clamp), low = pack_pair<T>(-op.clamp, -op.clamp);

    std::uint32_t previous = 0;
    int buffer = 0, y = segment.y + row - kRows;
    for (int step = 0; step < plan.steps; ++step, y += kRows) {
        const std::uint32_t field = fields + buffer * kField;
        barrier_wait(barrier_of(team, kFull + buffer), 2 * kGroup);
        if (step > 0) {
            const std::int64_t pixel_at = static_cast<std::int64_t>(y) * width + x;
            std::uint32_t noise[kTurns][2] = {};
            if (op.noise != nullptr) {
                const std::int64_t at = segment.sample * op.noise_stride + pixel_at;
#pragma unroll
                for (int n = 0; n < kTurns; ++n) {
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        if (n >= turns || y + 2 * h >= height) continue;
                        const std::int64_t index = at + 2 * h * width + 16 * n;
                        noise[n][h] = op.noise_float ? static_cast<const std::uint32_t*>(op.noise)[index]
                                                     : static_cast<const unsigned short*>(op.noise)[index];
                    }
                }
            }
            const std::int64_t first_pixel = static_cast<std::int64_t>(segment.sample) * height * width;
            T* out = static_cast<T*>(op.y) + (first_pixel + pixel_at) * op.out_channels + channel;
            std::uint32_t b[7][4];
            const auto fetch = [&](int n) {
#pragma unroll
                for (int r = 0; r < 7; ++r) {
                    const std::uint32_t start = r < 3 ? previous + (r + 1) * 2 * kPlane : field + (r - 3) * 2 * kPlane;
                    load_matrices_transposed(b[r], start + unit + n * 512);
                }
            };
            fetch(0);
#pragma unroll
            for (int n = 0; n < kTurns; ++n) {
                if (4 * n + warp >= kColumns / 4) break;
                float sums[4][4] = {};
                multiply_patch<T>(sums, taps, b);
                if (n + 1 < kTurns && 4 * (n + 1) + warp < kColumns / 4) fetch(n + 1);
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const std::uint32_t word = noise[n][h];
                    const float added = (op.noise_float ? __uint_as_float(word) : unpack_pair<T>(word).x) * strength;
                    std::uint32_t words[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        float v[2];
#pragma unroll
                        for (int e = 0; e < 2; ++e) {
                            v[e] = fmaf(sums[i][2 * h + e], op.gain, bias[2 * i + e] + added);
                            v[e] = fmaxf(v[e], v[e] * op.slope);
                        }
                        words[i] = limited_pair<T>(pack_pair<T>(v[0], v[1]), low, high);
                    }
                    if (n < turns && y + 2 * h < height) {
                        store16(out + (2 * h * width + 16 * n) * op.out_channels,
                                make_uint4(words[0], words[1], words[2], words[3]));
                    }
                }
            }
            const int before = buffer == 0 ? kFields - 1 : buffer - 1;
            if (step - 1 + kFields < plan.steps) barrier_arrive(barrier_of(team, kEmpty + before), 2 * kGroup);
        }
        previous = field;
        buffer = buffer + 1 == kFields ? 0 : buffer + 1;
    }
}

}  // namespace clone_fast::resampled

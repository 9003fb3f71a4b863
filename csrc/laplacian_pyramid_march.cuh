// The kernels of laplacian_pyramid for large levels whose rows can be read four neighbours at once: a warp walks down a
// strip of 128 columns, two rows at a step, with what the stencils still need of the rows above in registers and the
// rows of the next three steps on their way. No shared memory, no barrier, and the rows that warps one below the other
// both read are 8 of `rows`.
//
// Step p has rows y0-4+2p and the next. From them comes low row y0/2-3+p (p >= 2), and from that rows y0-8+2p and the
// next (p >= 4). Everything that lives for some steps is kept in slot p % 3.
#pragma once

#include "laplacian_pyramid_levels.cuh"

namespace clone_fast::pyramid {

inline constexpr int kMarchWarps = 4, kMarchThreads = 32 * kMarchWarps;
inline constexpr int kMarchResident = 4;  // blocks of a multiprocessor: 128 registers for each thread
inline constexpr int kMarchFewer = 3;     // of those with slopes in float32 and images beside them: 168

// Where this warp stands; the warps of a block are one above the other.
struct March {
    std::int64_t plane;
    int y0, x;
    bool own;   // the columns are this strip's and inside the image
    int steps;  // 0: below the image

    __device__ __forceinline__ March(const Level& level, int rows) {
        const unsigned row = blockIdx.x / level.strips;
        const int strip = static_cast<int>(blockIdx.x - row * level.strips), lane = threadIdx.x % 32;
        const unsigned tile = row % level.tiles;
        plane = row / level.tiles;
        y0 = static_cast<int>(tile * kMarchWarps + warp_of_block()) * rows;
        const bool overlaps = level.strips > 1;
        x = (overlaps ? strip * kStep - 4 : 0) + 4 * lane;
        own = x < level.width && (!overlaps || (lane > 0 && lane < 31));
        steps = y0 < level.height ? (min(rows, level.height - y0) + 1) / 2 + 4 : 0;
    }
    // step(p, slot) for every step, with constant slots.
    template <typename Step>
    __device__ __forceinline__ void walk(Step&& step) const {
#pragma unroll 1
        for (int p = 0; p < steps; p += 3) {
            step(p, std::integral_constant<int, 0>{});
            if (p + 1 < steps) step(p + 1, std::integral_constant<int, 1>{});
            if (p + 2 < steps) step(p + 2, std::integral_constant<int, 2>{});
        }
    }
};

// Bytes 0 and 1: 255 where a (b) is negative.
__device__ __forceinline__ unsigned negative(float a, float b) {
    const unsigned low = __float_as_int(a), high = __float_as_int(b);
    unsigned bytes;
    asm("prmt.b32 %0, %1, %2, 0xfb;" : "=r"(bytes) : "r"(low), "r"(high));
    return bytes;
}

// The signs of four numbers as int8. Zeros are rare.
__device__ __forceinline__ unsigned pack_signs(const float (&d)[4]) {
    unsigned bytes = __byte_perm(negative(d[0], d[1]), negative(d[2], d[3]), 0x5410) | 0x01010101u;
    if (d[0] == 0 || d[1] == 0 || d[2] == 0 || d[3] == 0) {
#pragma unroll
        for (int k = 0; k < 4; ++k) bytes &= d[k] == 0 ? ~(0xffu << 8 * k) : ~0u;
    }
    return bytes;
}

// kDifference: the level is x - y, whose squares are summed with kSquares. Not for the last level.
template <typename T, bool kDifference, bool kSquares, bool kAbsolute>
__global__ void __launch_bounds__(kMarchThreads, kMarchResident) march_down(const __grid_constant__ Down a) {
    using Slope = typename Rho<kAbsolute>::Slope;
    constexpr int images = kDifference ? 2 : 1;
    const March at(a.level, a.rows);
    const Rho<kAbsolute> rho{a.eps_squared};
    const int height = a.level.height, width = a.level.width;
    const int low_height = a.level.low_height(), low_width = width / 2;
    const Columns<false> columns(at.x, width);
    const int sample = static_cast<int>(at.plane) / a.channels, channel = static_cast<int>(at.plane) % a.channels;
    const int column = min(max(at.x, 0), width - 4);
    const T* from[2] = {static_cast<const T*>(a.x) + sample * a.x_strides.n + channel * a.x_strides.c + column,
                        static_cast<const T*>(a.y) + sample * a.y_strides.n + channel * a.y_strides.c + column};
    const int stride[2] = {static_cast<int>(a.x_strides.h), static_cast<int>(a.y_strides.h)};
    float* low_to = a.low + (at.plane * low_height + at.y0 / 2) * low_width + at.x / 2;
    Slope* slope = static_cast<Slope*>(a.slope);
    if (slope != nullptr) slope += (at.plane * height + at.y0) * width + at.x;

    typename Four<T>::Bytes raw[3][2][images];
    float fine[3][2][4], half[3][2][2], wide[3][4], before[2] = {};
    float sum = 0, squares = 0;
    const auto load = [&](int p, auto slot) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int y = clamped(at.y0 - 4 + 2 * p + r, height);
#pragma unroll
            for (int i = 0; i < images; ++i) {
                raw[slot.value][r][i] = Four<T>::load(from[i] + y * stride[i]);
            }
        }
    };
    wait_for_previous();
    load(0, std::integral_constant<int, 0>{});
    load(1, std::integral_constant<int, 1>{});
    load(2, std::integral_constant<int, 2>{});
    at.walk([&](int p, auto slot) {
        constexpr int s = slot.value, s1 = (s + 2) % 3, s2 = (s + 1) % 3;  // of this step, one and two steps ago
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            Four<T>::unpack(raw[s][r][0], fine[s][r]);
            if constexpr (kDifference) {
                float y[4];
                Four<T>::unpack(raw[s][r][images - 1], y);
#pragma unroll
                for (int k = 0; k < 4; ++k) fine[s][r][k] -= y[k];
            }
        }
        if (p + 3 < at.steps) load(p + 3, slot);
        columns.decimate_row(fine[s][0], half[s][0]);
        columns.decimate_row(fine[s][1], half[s][1]);
        if (p < 2) return;
        const int i = at.y0 / 2 - 3 + p;
        float low[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            low[k] = decimate(half[s2][0][k], half[s2][1][k], half[s1][0][k], half[s1][1][k], half[s][0][k]) / 256;
            low[k] = before[k] = i < low_height ? low[k] : before[k];
        }
        if (p > 2 && p + 1 < at.steps && at.own && i < low_height) {
            *reinterpret_cast<float2*>(low_to + (p - 3) * low_width) = make_float2(low[0], low[1]);
        }
        {  // Columns::interpolate_row, odd columns without their factor 4: it is a power of two and is in those below
            float left = __shfl_up_sync(~0u, low[1], 1), right = __shfl_down_sync(~0u, low[0], 1);
            if (columns.first) left = low[0];
            if (columns.last) right = low[1];
            wide[s][0] = interpolate_even(left, low[0], low[1]);
            wide[s][1] = low[0] + low[1];
            wide[s][2] = interpolate_even(low[0], low[1], right);
            wide[s][3] = low[1] + right;
        }
        if (p == 3 && at.y0 == 0) {
#pragma unroll
            for (int k = 0; k < 4; ++k) wide[s1][k] = wide[s][k];
        }
        if (p < 4) return;
        const int r = 2 * p - 8;
        float (&top)[4] = fine[s2][0], (&bottom)[4] = fine[s2][1];
        if constexpr (kSquares) {  // before these are the band
            if (at.own) squares += sum_of_squares(top);
            if (at.own && at.y0 + r + 1 < height) squares += sum_of_squares(bottom);
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const float factor = k % 2 == 0 ? -1.0f / 64 : -4.0f / 64;
            top[k] = fmaf(factor, interpolate_even(wide[s2][k], wide[s1][k], wide[s][k]), top[k]);
            bottom[k] = fmaf(4 * factor, wide[s1][k] + wide[s][k], bottom[k]);
        }
#pragma unroll
        for (int b = 0; b < 2; ++b) {
            const float (&band)[4] = fine[s2][b];
            if (!at.own || at.y0 + r + b >= height) continue;
            sum += (rho(band[0]) + rho(band[1])) + (rho(band[2]) + rho(band[3]));
            if (slope == nullptr) continue;
            if constexpr (kAbsolute) *reinterpret_cast<unsigned*>(slope + (r + b) * width) = pack_signs(band);
            else store_slopes(slope + (r + b) * width, band, rho);
        }
    });
    let_next_come();
    write_partial<kSquares>(a, sum, squares);
}

// ---- up ------------------------------------------------------------------------------------------------------------

// The slopes of four neighbours, and how a row of them is decimated (adjoint). int8: integers all the way down, two low
// columns in one register, 16 bits each, until both axes are done.
template <bool kAbsolute>
struct SlopeRow;

template <>
struct SlopeRow<true> {
    using Bytes = unsigned;
    using Half = int;

    int left, own[2], right;  // taps as bytes

    __device__ __forceinline__ explicit SlopeRow(const Columns<true>& at) {
        left = at.first ? 0 : 0x04010000;
        right = at.last ? 0 : 1;
        own[0] = static_cast<int>(at.low_even[0]) | static_cast<int>(at.low_odd[0]) << 8 | 1 << 16;
        own[1] = 1 | 4 << 8 | static_cast<int>(at.low_even[1]) << 16 | static_cast<int>(at.low_odd[1]) << 24;
    }
    static __device__ __forceinline__ Bytes zero() { return 0; }
    __device__ __forceinline__ Half decimate_row(const Columns<true>&, Bytes row) const {
        const int here = static_cast<int>(row);
        const int before = __shfl_up_sync(~0u, here, 1), after = __shfl_down_sync(~0u, here, 1);
        return __dp4a(here, own[0], __dp4a(before, left, 0)) + __dp4a(here, own[1], __dp4a(after, right, 0)) * 65536;
    }
    static __device__ __forceinline__ void decimate_column(Half a, Half b, Half c, Half d, Half e, int even, int odd,
                                                           float (&sum)[2]) {
        const int both = a + e + 4 * b + even * c + odd * d;
        const short first = static_cast<short>(both);
        sum[0] = static_cast<float>(first);
        sum[1] = static_cast<float>((both - first) >> 16);
    }
    static __device__ __forceinline__ void unpack(Bytes row, float (&v)[4]) { unpack_signs(row, v); }
};

template <>
struct SlopeRow<false> {
    using Bytes = float4;
    using Half = float2;

    __device__ __forceinline__ explicit SlopeRow(const Columns<true>&) {}
    static __device__ __forceinline__ Bytes zero() { return make_float4(0, 0, 0, 0); }
    __device__ __forceinline__ Half decimate_row(const Columns<true>& columns, const Bytes& row) const {
        float v[4], low[2];
        unpack(row, v);
        columns.decimate_row(v, low);
        return make_float2(low[0], low[1]);
    }
    static __device__ __forceinline__ void decimate_column(Half a, Half b, Half c, Half d, Half e, int even, int odd,
                                                           float (&sum)[2]) {
        sum[0] = decimate(a.x, b.x, c.x, d.x, e.x, static_cast<float>(even), static_cast<float>(odd));
        sum[1] = decimate(a.y, b.y, c.y, d.y, e.y, static_cast<float>(even), static_cast<float>(odd));
    }
    static __device__ __forceinline__ void unpack(const Bytes& row, float (&v)[4]) { Four<float>::unpack(row, v); }
};

// Not for the last level; what `out`, and for the squares x and y, say of vectors as for march_down.
template <typename T, bool kSquares, bool kAbsolute>
__global__ void __launch_bounds__(kMarchThreads, kSquares && !kAbsolute ? kMarchFewer : kMarchResident)
    march_up(const __grid_constant__ Up a) {
    using Row = SlopeRow<kAbsolute>;
    if (a.sum.loss != nullptr && blockIdx.x == gridDim.x - 1) return sum_partials(a.sum);
    const March at(a.level, a.rows);
    const int height = a.level.height, width = a.level.width;
    const int low_height = a.level.low_height(), low_width = width / 2;
    const Columns<true> columns(at.x, width);
    const Row row(columns);
    wait_for_previous();
    const float gain = a.gain == nullptr ? 1.0f : *a.gain, scale = gain * a.scale;
    const float coarse_factor = gain / 256, slope_factor = scale / (-64 * 256);
    const bool inside = at.x >= 0 && at.x < width;
    const auto* slope =
        static_cast<const typename Rho<kAbsolute>::Slope*>(a.slope) + (at.plane * height + at.y0 - 4) * width + at.x;
    const float* coarse = a.coarse + (at.plane * low_height + at.y0 / 2 - 3) * low_width + at.x / 2;
    const int sample = static_cast<int>(at.plane) / a.channels, channel = static_cast<int>(at.plane) % a.channels;
    const int stride = static_cast<int>(a.strides.h);
    T* out = static_cast<T*>(a.out) + sample * a.strides.n + channel * a.strides.c +
             at.y0 * static_cast<std::int64_t>(stride) + at.x;
    const auto image = [&](const void* from, const ImageStrides& s) {
        return static_cast<const T*>(from) + sample * s.n + channel * s.c + min(max(at.x, 0), width - 4);
    };
    [[maybe_unused]] const T* x = kSquares ? image(a.x, a.x_strides) : nullptr;
    [[maybe_unused]] const T* y = kSquares ? image(a.y, a.y_strides) : nullptr;
    [[maybe_unused]] const int x_stride = static_cast<int>(a.x_strides.h);
    [[maybe_unused]] const int y_stride = static_cast<int>(a.y_strides.h);
    [[maybe_unused]] const float squares = gain * a.squares;

    typename Row::Bytes raw[3][2], fine[3][2];
    typename Row::Half half[3][2];
    float2 below[3];
    float wide[3][4];
    [[maybe_unused]] typename Four<T>::Bytes pixels[3][2][2];
    [[maybe_unused]] const auto load_pixels = [&](int p, auto slot) {  // x and y of the rows that step p writes
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = min(at.y0 - 8 + 2 * p + r, height - 1);
            pixels[slot.value][r][0] = Four<T>::load(x + row * x_stride);
            pixels[slot.value][r][1] = Four<T>::load(y + row * y_stride);
        }
    };
    const auto load = [&](int p, auto slot) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int y = at.y0 - 4 + 2 * p + r;
            raw[slot.value][r] = Row::zero();
            if (inside && y >= 0 && y < height) {
                raw[slot.value][r] = *reinterpret_cast<const typename Row::Bytes*>(slope + (2 * p + r) * width);
            }
        }
        const int i = at.y0 / 2 - 3 + p;
        below[slot.value] = make_float2(0, 0);
        if (p >= 2 && inside && i >= 0 && i < low_height) {
            below[slot.value] = *reinterpret_cast<const float2*>(coarse + p * low_width);
        }
    };
    load(0, std::integral_constant<int, 0>{});
    load(1, std::integral_constant<int, 1>{});
    load(2, std::integral_constant<int, 2>{});
    if constexpr (kSquares) {
        load_pixels(4, std::integral_constant<int, 1>{});
        load_pixels(5, std::integral_constant<int, 2>{});
        load_pixels(6, std::integral_constant<int, 0>{});
    }
    at.walk([&](int p, auto slot) {
        constexpr int s = slot.value, s1 = (s + 2) % 3, s2 = (s + 1) % 3;
        float low[2] = {coarse_factor * below[s].x, coarse_factor * below[s].y};
        fine[s][0] = raw[s][0], fine[s][1] = raw[s][1];
        if (p + 3 < at.steps) load(p + 3, slot);
        half[s][0] = row.decimate_row(columns, fine[s][0]);
        half[s][1] = row.decimate_row(columns, fine[s][1]);
        if (p < 2) return;
        const int i = at.y0 / 2 - 3 + p;
        if (i >= 0 && i < low_height) {
            const bool end = i == low_height - 1;
            float sum[2];
            Row::decimate_column(half[s2][0], half[s2][1], half[s1][0], half[s1][1], half[s][0],
                                 6 + (i == 0) + end, end ? 8 : 4, sum);
            low[0] = fmaf(slope_factor, sum[0], low[0]);
            low[1] = fmaf(slope_factor, sum[1], low[1]);
        } else {
            low[0] = low[1] = 0;
        }
        columns.interpolate_row(low, wide[s]);
        if (p < 4) return;
        const int r = 2 * p - 8, y = at.y0 + r;
        const float even = Weights::fine_even(y, height), odd = Weights::fine_odd(y + 1, height);
        float top[4], bottom[4];
        Row::unpack(fine[s2][0], top);
        Row::unpack(fine[s2][1], bottom);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            top[k] = fmaf(scale, top[k], interpolate_even(wide[s2][k], wide[s1][k], wide[s][k], even));
            bottom[k] = fmaf(scale, bottom[k], interpolate_odd(wide[s1][k], wide[s][k], odd));
        }
        if constexpr (kSquares) {
            add_difference<T>(top, squares, pixels[s][0][0], pixels[s][0][1]);
            add_difference<T>(bottom, squares, pixels[s][1][0], pixels[s][1][1]);
            if (p + 3 < at.steps) load_pixels(p + 3, slot);
        }
        if (!at.own) return;
        Four<T>::store(out + r * stride, top);
        if (y + 1 < height) Four<T>::store(out + (r + 1) * stride, bottom);
    });
}

}  // namespace clone_fast::pyramid

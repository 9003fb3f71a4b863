// What the kernels of laplacian_pyramid share: the two stencils, as a warp applies them to rows of an image, and rho.
//
// Along one axis, a fine level and the level below it, `low`, are tied by
//     low[i] = fine[2i-2] + 4 fine[2i-1] + 6 fine[2i] + 4 fine[2i+1] + fine[2i+2]     ("decimate")
//     fine[2k] = low[k-1] + 6 low[k] + low[k+1],   fine[2k+1] = 4 low[k] + 4 low[k+1]  ("interpolate")
// reduce = decimate / 16 and expand = interpolate / 8, borders repeated. Their adjoints have the same taps: reduce^T =
// interpolate / 16 and expand^T = decimate / 8, where what lies outside is zero and the repeated borders are in the
// middle weights of the outermost samples: see `Weights`.
//
// A warp holds a row of 128 fine samples, four neighbours in each lane, and so two neighbours of a row of low ones;
// what lies next to these it asks of the lanes beside it. Where the image is wider, strips of 128 overlap by a lane on
// either side, which is there to be asked only.
//
// The taps are summed so that a constant comes through without rounding: its bands are exactly zero.
#pragma once

#include "laplacian_pyramid.h"
#include "_ptx.cuh"

namespace clone_fast::pyramid {

inline constexpr int kStrip = 128, kStep = 120;  // columns of a strip, and from one to the next

__device__ __forceinline__ int clamped(int i, int size) { return min(max(i, 0), size - 1); }

// The same number for all of a warp, as the compiler can see too.
__device__ __forceinline__ int warp_of_block() { return __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0); }

// ---- the stencils along one axis ---------------------------------------------------------------------------------

// The middle weights of the adjoints, which hold the repeated borders; elsewhere they are 6 and 4.
struct Weights {
    // of the samples 2i and 2i + 1 in low sample i of `size`: expand^T
    static __device__ __forceinline__ float low_even(int i, int size) { return 6.0f + (i == 0) + (i == size - 1); }
    static __device__ __forceinline__ float low_odd(int i, int size) { return i == size - 1 ? 8.0f : 4.0f; }
    // of the low sample p / 2 in sample p of `size`: reduce^T
    static __device__ __forceinline__ float fine_even(int p, int size) {
        return 6.0f + (p == 0 ? 5.0f : 0.0f) + (p == size - 1 ? 5.0f : 0.0f);
    }
    static __device__ __forceinline__ float fine_odd(int p, int size) { return p == size - 1 ? 5.0f : 4.0f; }
};

__device__ __forceinline__ float decimate(float a, float b, float c, float d, float e) {
    return fmaf(4.0f, b + d, fmaf(6.0f, c, a + e));
}
__device__ __forceinline__ float decimate(float a, float b, float c, float d, float e, float even, float odd) {
    return fmaf(4.0f, b, fmaf(odd, d, fmaf(even, c, a + e)));
}
__device__ __forceinline__ float interpolate_even(float a, float b, float c, float even = 6.0f) {
    return fmaf(even, b, a + c);
}
__device__ __forceinline__ float interpolate_odd(float b, float c) { return 4.0f * (b + c); }
__device__ __forceinline__ float interpolate_odd(float b, float c, float odd) { return fmaf(odd, b, 4.0f * c); }

// ---- the stencils along the rows of a warp -----------------------------------------------------------------------

// The four columns of this lane, from x on.
template <bool kAdjoint>
struct Columns {
    int x, width, low_width;  // of the image, fine and low
    bool first, last;         // its neighbour lies outside the image
    float low_even[2], low_odd[2], fine_even[2], fine_odd[2];

    __device__ __forceinline__ Columns(int x, int width) : x(x), width(width), low_width((width + 1) / 2) {
        first = x <= 0, last = x + 4 >= width;
        if constexpr (kAdjoint) {
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                low_even[k] = Weights::low_even(x / 2 + k, low_width),
                low_odd[k] = Weights::low_odd(x / 2 + k, low_width);
                fine_even[k] = Weights::fine_even(x + 2 * k, width),
                fine_odd[k] = Weights::fine_odd(x + 2 * k + 1, width);
            }
        }
    }
    __device__ __forceinline__ int low() const { return x / 2; }

    // v, outside the image repeated (kAdjoint: zero) -> the low samples low(), low() + 1.
    __device__ __forceinline__ void decimate_row(const float (&v)[4], float (&low)[2]) const {
        float a = __shfl_up_sync(~0u, v[2], 1), b = __shfl_up_sync(~0u, v[3], 1), e = __shfl_down_sync(~0u, v[0], 1);
        if (first) a = b = kAdjoint ? 0.0f : v[0];
        if (last) e = kAdjoint ? 0.0f : v[3];
        if constexpr (kAdjoint) {
            low[0] = decimate(a, b, v[0], v[1], v[2], low_even[0], low_odd[0]);
            low[1] = decimate(v[0], v[1], v[2], v[3], e, low_even[1], low_odd[1]);
        } else {
            low[0] = decimate(a, b, v[0], v[1], v[2]);
            low[1] = decimate(v[0], v[1], v[2], v[3], e);
        }
    }
    // Low samples, kAdjoint: zero outside the image -> the four fine samples.
    __device__ __forceinline__ void interpolate_row(const float (&low)[2], float (&v)[4]) const {
        float left = __shfl_up_sync(~0u, low[1], 1), right = __shfl_down_sync(~0u, low[0], 1);
        if constexpr (kAdjoint) {
            if (first) left = 0;
            if (last) right = 0;
            v[0] = interpolate_even(left, low[0], low[1], fine_even[0]);
            v[1] = interpolate_odd(low[0], low[1], fine_odd[0]);
            v[2] = interpolate_even(low[0], low[1], right, fine_even[1]);
            v[3] = interpolate_odd(low[1], right, fine_odd[1]);
        } else {
            const float here = x / 2 + 1 < low_width ? low[1] : low[0];
            if (first) left = low[0];
            if (last) right = here;
            v[0] = interpolate_even(left, low[0], here);
            v[1] = interpolate_odd(low[0], here);
            v[2] = interpolate_even(low[0], here, right);
            v[3] = interpolate_odd(here, right);
        }
    }
};

// ---- the stencils along both axes, kRows fine rows at once ---------------------------------------------------------

// Fine rows y0-4 .. y0+kRows+2 -> use(r, band) for rows y0+r of this lane, with band = fine - expand(reduce(fine)), and
// put(t, low) for the low rows y0/2+t that belong to these. row(r, v) gives fine row y0-4+r, repeated outside the
// image; it is asked twice for the rows that are used, which is cheaper than to hold them.
template <int kRows, typename Row, typename Put, typename Use>
__device__ __forceinline__ void strip_down(const Columns<false>& columns, int y0, int height, Row&& row, Put&& put,
                                           Use&& use) {
    static_assert(kRows % 2 == 0);
    const int low_height = (height + 1) / 2;
    float half[kRows + 7][2], low[kRows / 2 + 2][2], wide[kRows / 2 + 2][4];
#pragma unroll
    for (int t = 0; t < kRows / 2 + 2; ++t) {
        const int i = y0 / 2 - 1 + t;
#pragma unroll
        for (int r = t == 0 ? 0 : 2 * t + 3; r < 2 * t + 5; ++r) {
            float fine[4];
            row(r, fine);
            columns.decimate_row(fine, half[r]);
        }
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            low[t][k] = decimate(half[2 * t][k], half[2 * t + 1][k], half[2 * t + 2][k], half[2 * t + 3][k],
                                 half[2 * t + 4][k]) /
                        256;
            if (t > 0 && i >= low_height) low[t][k] = low[t - 1][k];
        }
        if (t > 0 && t <= kRows / 2) put(t - 1, low[t]);
        columns.interpolate_row(low[t], wide[t]);
        if (t < 2) continue;
        float top[4], bottom[4];
        row(2 * t, top);
        row(2 * t + 1, bottom);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const float above = t == 2 && y0 == 0 ? wide[1][k] : wide[t - 2][k];
            top[k] -= interpolate_even(above, wide[t - 1][k], wide[t][k]) / 64;
            bottom[k] -= interpolate_odd(wide[t - 1][k], wide[t][k]) / 64;
        }
        use(2 * t - 4, top);
        use(2 * t - 3, bottom);
    }
}

// Rows y0-4 .. y0+kRows+2 of slopes g -> use(r, v) for rows y0+r of this lane, with
// v = scale * g + reduce^T(gain * coarse - expand^T(scale * g)).
// row(r, g) gives row y0-4+r, again twice where it is used, and coarse(t, v) low row y0/2-1+t, both zero outside the
// image.
template <int kRows, typename Row, typename Coarse, typename Use>
__device__ __forceinline__ void strip_up(const Columns<true>& columns, int y0, int height, float scale, float gain,
                                         Row&& row, Coarse&& coarse, Use&& use) {
    static_assert(kRows % 2 == 0);
    const int low_height = (height + 1) / 2;
    const float coarse_factor = gain / 256, slope_factor = scale / (-64 * 256);
    float half[kRows + 7][2], low[kRows / 2 + 2][2], wide[kRows / 2 + 2][4];
#pragma unroll
    for (int t = 0; t < kRows / 2 + 2; ++t) coarse(t, low[t]);
#pragma unroll
    for (int t = 0; t < kRows / 2 + 2; ++t) {
        const int i = y0 / 2 - 1 + t;
        const float even = Weights::low_even(i, low_height), odd = Weights::low_odd(i, low_height);
#pragma unroll
        for (int r = t == 0 ? 0 : 2 * t + 3; r < 2 * t + 5; ++r) {
            float fine[4];
            row(r, fine);
            columns.decimate_row(fine, half[r]);
        }
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const float sum = decimate(half[2 * t][k], half[2 * t + 1][k], half[2 * t + 2][k], half[2 * t + 3][k],
                                       half[2 * t + 4][k], even, odd);
            const bool inside = i >= 0 && i < low_height && columns.low() + k < columns.low_width;
            low[t][k] = inside ? fmaf(slope_factor, sum, coarse_factor * low[t][k]) : 0.0f;
        }
        columns.interpolate_row(low[t], wide[t]);
        if (t < 2) continue;
        const int y = y0 + 2 * t - 4;
        const float fine_even = Weights::fine_even(y, height), fine_odd = Weights::fine_odd(y + 1, height);
        float top[4], bottom[4];
        row(2 * t, top);
        row(2 * t + 1, bottom);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            top[k] = fmaf(scale, top[k], interpolate_even(wide[t - 2][k], wide[t - 1][k], wide[t][k], fine_even));
            bottom[k] = fmaf(scale, bottom[k], interpolate_odd(wide[t - 1][k], wide[t][k], fine_odd));
        }
        use(2 * t - 4, top);
        use(2 * t - 3, bottom);
    }
}

// ---- rho, and slopes in memory -----------------------------------------------------------------------------------

// rho(d) = |d| with slopes in int8, or sqrt(d^2 + eps^2) with slopes in float32. Small code: it is there for each pixel
// of an unrolled strip.
template <bool kAbsolute>
struct Rho {
    using Slope = std::conditional_t<kAbsolute, signed char, float>;

    float eps_squared;

    __device__ __forceinline__ float operator()(float d) const {
        if constexpr (kAbsolute) return fabsf(d);
        const float square = squared(d);
        return square * inverse_root(square);
    }
    __device__ __forceinline__ Slope slope(float d) const {
        // The order of floats is that of their bits as integers, but for -0, which no band is.
        if constexpr (kAbsolute) return static_cast<Slope>(max(min(__float_as_int(d), 1), -1));
        else return d * inverse_root(squared(d));
    }

private:
    // Never zero, so that its root can be divided by.
    __device__ __forceinline__ float squared(float d) const { return fmaxf(fmaf(d, d, eps_squared), 1.17549435e-38f); }
    // The fast one is off by up to 2 units in the last place; a step of Newton mends that.
    static __device__ __forceinline__ float inverse_root(float x) {
        float root;
        asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(x));
        return fmaf(root, fmaf(-0.5f * x * root, root, 0.5f), root);
    }
};

// Slopes of four neighbours, aligned.
template <bool kAbsolute>
__device__ __forceinline__ void store_slopes(typename Rho<kAbsolute>::Slope* to, const float (&d)[4],
                                             const Rho<kAbsolute>& rho) {
    if constexpr (kAbsolute) {
        const unsigned low = __byte_perm(rho.slope(d[0]), rho.slope(d[1]), 0x0040);
        const unsigned high = __byte_perm(rho.slope(d[2]), rho.slope(d[3]), 0x0040);
        *reinterpret_cast<unsigned*>(to) = __byte_perm(low, high, 0x5410);
    } else {
        *reinterpret_cast<float4*>(to) =
            make_float4(rho.slope(d[0]), rho.slope(d[1]), rho.slope(d[2]), rho.slope(d[3]));
    }
}
// Four int8 as float: the bytes become the low bits of 2^23 + 128 + byte, without a conversion.
__device__ __forceinline__ void unpack_signs(unsigned bytes, float (&v)[4]) {
    bytes ^= 0x80808080u;
#pragma unroll
    for (int k = 0; k < 4; ++k) v[k] = __uint_as_float(__byte_perm(bytes, 0x4b000000u, 0x7440 | k)) - 8388736.0f;
}

// ---- four elements at once: 16 bytes of float32, 8 of the halves ---------------------------------------------------

template <typename T>
struct Four {
    using Bytes = std::conditional_t<sizeof(T) == 4, float4, uint2>;

    static __device__ __forceinline__ Bytes load(const T* from) { return *reinterpret_cast<const Bytes*>(from); }
    static __device__ __forceinline__ void unpack(Bytes bytes, float (&v)[4]) {
        if constexpr (sizeof(T) == 4) {
            v[0] = bytes.x, v[1] = bytes.y, v[2] = bytes.z, v[3] = bytes.w;
        } else {
            float eight[8];
            clone_fast::unpack<T>(make_uint4(bytes.x, bytes.y, 0, 0), eight);
#pragma unroll
            for (int i = 0; i < 4; ++i) v[i] = eight[i];
        }
    }
    static __device__ __forceinline__ void store(T* to, const float (&v)[4]) {
        if constexpr (sizeof(T) == 4) *reinterpret_cast<float4*>(to) = make_float4(v[0], v[1], v[2], v[3]);
        else *reinterpret_cast<uint2*>(to) = make_uint2(pack_pair<T>(v[0], v[1]), pack_pair<T>(v[2], v[3]));
    }
};

// v += factor * (x - y) of four neighbours, as they were loaded.
template <typename T>
__device__ __forceinline__ void add_difference(float (&v)[4], float factor, const typename Four<T>::Bytes& x,
                                               const typename Four<T>::Bytes& y) {
    float one[4], other[4];
    Four<T>::unpack(x, one);
    Four<T>::unpack(y, other);
#pragma unroll
    for (int k = 0; k < 4; ++k) v[k] = fmaf(factor, one[k] - other[k], v[k]);
}

// ---- sums --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float sum_of_squares(const float (&d)[4]) {
    return fmaf(d[0], d[0], d[1] * d[1]) + fmaf(d[2], d[2], d[3] * d[3]);
}

// The sum over the block of float64, valid in thread 0: rounding must not show in the last bit of the loss.
// partial: 32 numbers of shared memory.
__device__ __forceinline__ double block_sum(double value, double* partial) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
    __syncthreads();
    if (threadIdx.x == 0) {
        value = 0;
#pragma unroll 1
        for (unsigned i = 0; i < blockDim.x / 32; ++i) value += partial[i];
    }
    return value;
}
__device__ __forceinline__ double block_sum(double value) {
    __shared__ double partial[32];
    return block_sum(value, partial);
}

}  // namespace clone_fast::pyramid

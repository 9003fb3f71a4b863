// The kernel of laplacian_pyramid for all levels below a certain size: one block does a plane's, down and up again, in
// shared memory.
#pragma once

#include "laplacian_pyramid_strip.cuh"

namespace clone_fast::pyramid {

inline constexpr int kTailSize = 64;   // rows and columns of the first level, at most
inline constexpr int kTailLevels = 7;  // 64, 32, ..., 1
inline constexpr int kTailRows = 2;    // of a thread
inline constexpr int kTailThreads = kTailSize / 4 * (kTailSize / kTailRows);

static_assert(kTailSize <= kStrip);

struct Tail {
    float* level;  // the first level, [planes, H, W]; with `keep`, d loss / d level is written in its place
    bool keep;
    float eps_squared;
    int count;  // of levels
    int height[kTailLevels], width[kTailLevels];
    int pitch[kTailLevels],
        offset[kTailLevels];    // of rows and of the level, in floats of shared memory; multiples of 4
    double scale[kTailLevels];  // weight / number of elements
    double* partial;            // one sum for each block
};

// A level in shared memory, and this thread's rows and columns of it.
struct TailLevel {
    float* level;
    int height, width, pitch;
    int x, y0;

    __device__ __forceinline__ TailLevel(const Tail& a, int j, float* shared)
        : level(shared + a.offset[j]), height(a.height[j]), width(a.width[j]), pitch(a.pitch[j]) {
        // Lanes of a row are a power of two: a warp holds 32 / lanes groups of rows.
        const int shift = width <= 4 ? 0 : 32 - __clz((width - 1) / 4);
        x = (static_cast<int>(threadIdx.x) & ((1 << shift) - 1)) * 4,
        y0 = static_cast<int>(threadIdx.x >> shift) * kTailRows;
    }
    __device__ __forceinline__ bool owns(int r) const { return y0 + r < height && x < width; }
    // Columns behind the image, up to the pitch, may hold anything.
    __device__ __forceinline__ void store(int r, float a, float b, float c, float d) const {
        if (owns(r)) *reinterpret_cast<float4*>(level + (y0 + r) * pitch + x) = make_float4(a, b, c, d);
    }
};

// Rows y0-4 .. of a thread in registers, before anything is written. Outside the image the last samples are repeated
// (kAdjoint: there are zeros).
template <bool kAdjoint>
struct TailRows {
    float rows[kTailRows + 7][4];

    __device__ __forceinline__ explicit TailRows(const TailLevel& at) {
        const float* from = at.level + min(at.x, at.pitch - 4);
#pragma unroll
        for (int r = 0; r < kTailRows + 7; ++r) {
            const int y = at.y0 - 4 + r;
            Four<float>::unpack(Four<float>::load(from + clamped(y, at.height) * at.pitch), rows[r]);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const bool inside = at.x + k < at.width;
                if (!kAdjoint) rows[r][k] = inside || k == 0 ? rows[r][k] : rows[r][k == 0 ? 0 : k - 1];
                else rows[r][k] = inside && y >= 0 && y < at.height ? rows[r][k] : 0.0f;
            }
        }
        __syncthreads();
    }
    __device__ __forceinline__ void operator()(int r, float (&v)[4]) const {
#pragma unroll
        for (int k = 0; k < 4; ++k) v[k] = rows[r][k];
    }
};

// A level becomes its slopes, and the level below is written. Returns this thread's sum of rho.
template <bool kAbsolute>
__device__ __forceinline__ float tail_down(const Tail& a, int j, float* shared) {
    const TailLevel at(a, j, shared);
    const Rho<kAbsolute> rho{a.eps_squared};
    const int low_height = a.height[j + 1], low_pitch = a.pitch[j + 1];
    float* low = shared + a.offset[j + 1] + at.y0 / 2 * low_pitch + at.x / 2;
    float sum = 0;
    strip_down<kTailRows>(
        Columns<false>(at.x, at.width), at.y0, at.height, TailRows<false>(at),
        [&](int t, const float (&v)[2]) {
            if (at.x < at.width && at.y0 / 2 + t < low_height) {
                *reinterpret_cast<float2*>(low + t * low_pitch) = make_float2(v[0], v[1]);
            }
        },
        [&](int r, const float (&band)[4]) {
#pragma unroll
            for (int k = 0; k < 4; ++k) sum += at.owns(r) && at.x + k < at.width ? rho(band[k]) : 0.0f;
            at.store(r, rho.slope(band[0]), rho.slope(band[1]), rho.slope(band[2]), rho.slope(band[3]));
        });
    return sum;
}

// The slopes of a level become d loss / d level, from that of the level below.
__device__ __forceinline__ void tail_up(const Tail& a, int j, float* shared) {
    const TailLevel at(a, j, shared);
    const int low_height = a.height[j + 1], low_width = a.width[j + 1], low_pitch = a.pitch[j + 1];
    const float* low = shared + a.offset[j + 1];
    strip_up<kTailRows>(
        Columns<true>(at.x, at.width), at.y0, at.height, static_cast<float>(a.scale[j]), 1.0f, TailRows<true>(at),
        [&](int t, float (&v)[2]) {
            const int i = at.y0 / 2 - 1 + t, k = at.x / 2;
            v[0] = v[1] = 0;
            if (i >= 0 && i < low_height && k < low_width) v[0] = low[i * low_pitch + k];
            if (i >= 0 && i < low_height && k + 1 < low_width) v[1] = low[i * low_pitch + k + 1];
        },
        [&](int r, const float (&v)[4]) { at.store(r, v[0], v[1], v[2], v[3]); });
}

template <bool kAbsolute>
__global__ void __launch_bounds__(kTailThreads) tail_levels(const __grid_constant__ Tail a) {
    extern __shared__ __align__(16) float shared[];
    const int last = a.count - 1;
    const Rho<kAbsolute> rho{a.eps_squared};
    float* level = a.level + static_cast<std::int64_t>(blockIdx.x) * a.height[0] * a.width[0];
    const auto each = [&](int j, auto&& use) {  // use(in shared memory, in memory)
        const int width = a.width[j], step = kTailThreads / kTailSize;
        const int x = threadIdx.x % kTailSize;
        for (int y = threadIdx.x / kTailSize; y < a.height[j] && x < width; y += step) {
            use(shared[a.offset[j] + y * a.pitch[j] + x], y * width + x);
        }
    };
    each(0, [&](float& v, int i) { v = level[i]; });
    double total = 0;
#pragma unroll 1
    for (int j = 0; j < last; ++j) {
        __syncthreads();
        total += a.scale[j] * static_cast<double>(tail_down<kAbsolute>(a, j, shared));
    }
    __syncthreads();
    float sum = 0;
    each(last, [&](float& v, int) {
        sum += rho(v);
        v = static_cast<float>(a.scale[last]) * rho.slope(v);
    });
    total = block_sum(total + a.scale[last] * static_cast<double>(sum));
    if (threadIdx.x == 0) a.partial[blockIdx.x] = total;
    if (!a.keep) return;
#pragma unroll 1
    for (int j = last - 1; j >= 0; --j) {
        __syncthreads();
        tail_up(a, j, shared);
    }
    __syncthreads();
    each(0, [&](const float& v, int i) { level[i] = v; });
}

}  // namespace clone_fast::pyramid

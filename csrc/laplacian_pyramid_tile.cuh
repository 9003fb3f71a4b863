// What the kernels of laplacian_pyramid share: the two stencils, rho, and the passes over a tile in shared memory.
//
// A tile of the fine level lies in shared memory with a halo, `low` is what the level below has there:
//     low[i] = fine[2i-2] + 4 fine[2i-1] + 6 fine[2i] + 4 fine[2i+1] + fine[2i+2]     ("decimate")
//     fine[2k] = low[k-1] + 6 low[k] + low[k+1],   fine[2k+1] = 4 low[k] + 4 low[k+1]  ("interpolate")
// reduce = decimate / 16 and expand = interpolate / 8 along each axis, borders repeated. Their adjoints have the same
// taps: reduce^T = interpolate / 16 and expand^T = decimate / 8, where what lies outside is zero and the repeated borders
// are in the middle weights of the outermost samples: see `Middle`.
//
// The taps are summed so that a constant comes through without rounding: its bands are exactly zero.
#pragma once

#include "launch.cuh"
#include "laplacian_pyramid.h"

namespace clone_fast::pyramid {

// Four columns and kRows rows of the tile are one thread's; kPlanes images of a sample lie in one block's tile.
template <int kHeight, int kWidth, int kRows, int kPlanes = 1>
struct Tile {
    static constexpr int height = kHeight, width = kWidth, rows = kRows, planes = kPlanes;
    static constexpr int threads = kWidth / 4 * (kHeight / kRows);
    static constexpr int fine_rows = kHeight + 7, pitch = kWidth + 8;  // from 4 above and 4 left of the tile
    static constexpr int low_rows = kHeight / 2 + 2, low_pitch = kWidth / 2 + 2;  // from 1 above and 1 left
    static_assert(kWidth % 4 == 0 && kHeight % kRows == 0 && kRows % 2 == 0 && threads % 32 == 0);

    float fine[kPlanes][fine_rows][pitch];
    float half[fine_rows][low_pitch];  // decimated along x only
    float low[low_rows][low_pitch];
};

// ---- the two stencils ------------------------------------------------------------------------------------------

// The weights of the samples 2i and 2i+1 in decimate (kAdjoint: of expand^T, with `size` low samples), or of low[p / 2]
// in interpolate at p (kAdjoint: of reduce^T, with `size` fine samples).
template <bool kAdjoint>
struct Middle {
    static __device__ __forceinline__ float even_of_low(int i, int size) {
        return kAdjoint ? 6.0f + (i == 0) + (i == size - 1) : 6.0f;
    }
    static __device__ __forceinline__ float odd_of_low(int i, int size) {
        return kAdjoint && i == size - 1 ? 8.0f : 4.0f;
    }
    static __device__ __forceinline__ float even_of_fine(int p, int size) {
        return kAdjoint ? 6.0f + 5.0f * (p == 0) + 5.0f * (p == size - 1) : 6.0f;
    }
    static __device__ __forceinline__ float odd_of_fine(int p, int size) {
        return kAdjoint && p == size - 1 ? 5.0f : 4.0f;
    }
};

// Sample i of `size` low ones from the fine samples 2i-2 .. 2i+2.
template <bool kAdjoint>
__device__ __forceinline__ float decimate(float a, float b, float c, float d, float e, int i, int size) {
    const float sum = fmaf(Middle<kAdjoint>::even_of_low(i, size), c, a + e);
    return kAdjoint ? fmaf(4.0f, b, fmaf(Middle<kAdjoint>::odd_of_low(i, size), d, sum)) : fmaf(4.0f, b + d, sum);
}

// Sample p of `size` fine ones from the low samples p/2-1 .. p/2+1.
template <bool kAdjoint>
__device__ __forceinline__ float interpolate_even(float a, float b, float c, int p, int size) {
    return fmaf(Middle<kAdjoint>::even_of_fine(p, size), b, a + c);
}
template <bool kAdjoint>
__device__ __forceinline__ float interpolate_odd(float b, float c, int p, int size) {
    return kAdjoint ? fmaf(Middle<kAdjoint>::odd_of_fine(p, size), b, 4.0f * c) : 4.0f * (b + c);
}

// ---- rho ---------------------------------------------------------------------------------------------------------

struct Rho {
    float eps;  // negative: |d|

    __device__ __forceinline__ bool absolute() const { return eps < 0; }
    // rho(d), and its derivative in place of d.
    __device__ __forceinline__ float operator()(float& d) const {
        if (absolute()) {
            const float value = fabsf(d);
            d = static_cast<float>((d > 0) - (d < 0));
            return value;
        }
        const float value = sqrtf(fmaf(d, d, eps * eps));
        d = value > 0 ? d / value : 0.0f;
        return value;
    }
};

// Slopes of four neighbours or of one, int8 or float32.
__device__ __forceinline__ void store_slopes(void* to, std::int64_t at, const float (&v)[4], bool absolute) {
    if (absolute) {
        static_cast<char4*>(to)[at / 4] = make_char4(static_cast<signed char>(v[0]), static_cast<signed char>(v[1]),
                                                     static_cast<signed char>(v[2]), static_cast<signed char>(v[3]));
    } else {
        static_cast<float4*>(to)[at / 4] = make_float4(v[0], v[1], v[2], v[3]);
    }
}
__device__ __forceinline__ void store_slope(void* to, std::int64_t at, float v, bool absolute) {
    if (absolute) static_cast<signed char*>(to)[at] = static_cast<signed char>(v);
    else static_cast<float*>(to)[at] = v;
}
__device__ __forceinline__ float4 load_slopes(const void* from, std::int64_t at, bool absolute) {
    if (!absolute) return static_cast<const float4*>(from)[at / 4];
    const char4 v = static_cast<const char4*>(from)[at / 4];
    return make_float4(v.x, v.y, v.z, v.w);
}
__device__ __forceinline__ float load_slope(const void* from, std::int64_t at, bool absolute) {
    return absolute ? static_cast<const signed char*>(from)[at] : static_cast<const float*>(from)[at];
}

// ---- four elements at once: 16 bytes of float32, 8 of the halves --------------------------------------------------

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

// ---- where a block stands ----------------------------------------------------------------------------------------

// Launched while the kernel before it may still run (programmatic dependent launch, compute capability 9.0): wait for
// its results, and let the next kernel do the same.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    cudaTriggerProgrammaticLaunchCompletion();
    cudaGridDependencySynchronize();
#endif
}

struct Level {
    int height, width;  // of the fine side
    int tiles_y, tiles_x;

    __device__ __forceinline__ int low_height() const { return (height + 1) / 2; }
    __device__ __forceinline__ int low_width() const { return (width + 1) / 2; }
};

// Group of planes and first pixel of this block's tile.
template <class Tile>
struct Place {
    int group, y0, x0;

    __device__ __forceinline__ explicit Place(const Level& level) {
        const unsigned row = blockIdx.x / level.tiles_x;
        x0 = static_cast<int>(blockIdx.x - row * level.tiles_x) * Tile::width;
        group = static_cast<int>(row / level.tiles_y);
        y0 = static_cast<int>(row - group * level.tiles_y) * Tile::height;
    }
};

__device__ __forceinline__ int clamped(int i, int size) { return min(max(i, 0), size - 1); }

// ---- passes over the tile ----------------------------------------------------------------------------------------

// fine -> half. `first` is the low column of half[.][0], `size` the number of low columns.
template <bool kAdjoint, class Tile>
__device__ __forceinline__ void decimate_rows(Tile& tile, int plane, int first, int size) {
    constexpr int pairs = Tile::low_pitch / 2;
    for (int item = threadIdx.x; item < Tile::fine_rows * pairs; item += Tile::threads) {
        const int row = item / pairs, pair = item % pairs, i = first + 2 * pair;
        const float4* from = reinterpret_cast<const float4*>(&tile.fine[plane][row][4 * pair]);
        const float4 a = from[0], b = from[1];
        *reinterpret_cast<float2*>(&tile.half[row][2 * pair]) =
            make_float2(decimate<kAdjoint>(a.x, a.y, a.z, a.w, b.x, i, size),
                        decimate<kAdjoint>(a.z, a.w, b.x, b.y, b.z, i + 1, size));
    }
}

// One low sample of half, of `size` low rows, local row i (the first is `first`).
template <bool kAdjoint, class Tile>
__device__ __forceinline__ float decimate_column(const Tile& tile, int i, int j, int first, int size) {
    const float* from = &tile.half[2 * i][j];
    constexpr int p = Tile::low_pitch;
    return decimate<kAdjoint>(from[0], from[p], from[2 * p], from[3 * p], from[4 * p], first + i, size);
}

// low -> use(row, v) for this thread's rows of the tile: v are the thread's four columns, without the factor.
template <bool kAdjoint, class Tile, typename Use>
__device__ __forceinline__ void interpolate(const Tile& tile, int y0, int x0, const Level& level, Use&& use) {
    const int column = static_cast<int>(threadIdx.x) % (Tile::width / 4) * 4;
    const int top = static_cast<int>(threadIdx.x) / (Tile::width / 4) * Tile::rows;
    const int x = x0 + column;
    float above[4], here[4], below[4];
    const auto row_of = [&](int i, float (&v)[4]) {
        const float2* from = reinterpret_cast<const float2*>(&tile.low[i][column / 2]);
        const float2 a = from[0], b = from[1];
        v[0] = interpolate_even<kAdjoint>(a.x, a.y, b.x, x, level.width);
        v[1] = interpolate_odd<kAdjoint>(a.y, b.x, x + 1, level.width);
        v[2] = interpolate_even<kAdjoint>(a.y, b.x, b.y, x + 2, level.width);
        v[3] = interpolate_odd<kAdjoint>(b.x, b.y, x + 3, level.width);
    };
    row_of(top / 2, above);
    row_of(top / 2 + 1, here);
#pragma unroll
    for (int r = 0; r < Tile::rows; r += 2) {
        row_of((top + r) / 2 + 2, below);
        const int y = y0 + top + r;
        float even[4], odd[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            even[i] = interpolate_even<kAdjoint>(above[i], here[i], below[i], y, level.height);
            odd[i] = interpolate_odd<kAdjoint>(here[i], below[i], y + 1, level.height);
            above[i] = here[i], here[i] = below[i];
        }
        use(top + r, column, even);
        use(top + r + 1, column, odd);
    }
}

}  // namespace clone_fast::pyramid

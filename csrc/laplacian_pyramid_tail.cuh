// The kernel of laplacian_pyramid for all levels below a certain size: one block does a plane's, down and up again, in
// shared memory.
#pragma once

#include "laplacian_pyramid_tile.cuh"

namespace clone_fast::pyramid {

inline constexpr int kTailSize = 128;   // rows and columns of the first level, at most
inline constexpr int kTailLevels = 8;   // 128, 64, ..., 1

struct Tail {
    float* level;  // the first level, [planes, H, W]; with `keep`, d loss / d level is written in its place
    bool keep;
    Rho rho;
    int count;                 // of levels
    int height[kTailLevels], width[kTailLevels], offset[kTailLevels];  // in shared memory, in floats
    int scratch;               // where H x ceil(W/2) floats are free
    float scale[kTailLevels];  // weight / number of elements
    float* partial;            // one sum for each block
};

// use(row, column) for the threads' share of rows x columns.
template <typename Use>
__device__ __forceinline__ void for_each(int rows, int columns, Use&& use) {
    const int shift = 32 - __clz(columns - 1);  // columns <= 2^shift; 0 for one column
    const int step = max(static_cast<int>(blockDim.x) >> shift, 1);
    const int column = threadIdx.x & ((1 << shift) - 1);
    if (column >= columns) return;
    for (int row = static_cast<int>(threadIdx.x) >> shift; row < rows; row += step) use(row, column);
}

// fine [H, W] -> half [H, ceil(W/2)].
template <bool kAdjoint>
__device__ __forceinline__ void decimate_rows(const float* fine, int height, int width, float* half) {
    const int size = (width + 1) / 2;
    for_each(height, size, [&](int row, int i) {
        const float* from = fine + row * width;
        const auto at = [&](int column) {
            if (kAdjoint) return column >= 0 && column < width ? from[column] : 0.0f;
            return from[clamped(column, width)];
        };
        half[row * size + i] =
            decimate<kAdjoint>(at(2 * i - 2), at(2 * i - 1), from[2 * i], at(2 * i + 1), at(2 * i + 2), i, size);
    });
}

// half [H, w] -> use(i, j, sum) for the low samples [ceil(H/2), w].
template <bool kAdjoint, typename Use>
__device__ __forceinline__ void decimate_columns(const float* half, int height, int width, Use&& use) {
    const int size = (height + 1) / 2;
    for_each(size, width, [&](int i, int j) {
        const auto at = [&](int row) {
            if (kAdjoint) return row >= 0 && row < height ? half[row * width + j] : 0.0f;
            return half[clamped(row, height) * width + j];
        };
        use(i, j, decimate<kAdjoint>(at(2 * i - 2), at(2 * i - 1), at(2 * i), at(2 * i + 1), at(2 * i + 2), i, size));
    });
}

// low [ceil(H/2), ceil(W/2)] -> fine = change(fine, interpolated) over [H, W].
template <bool kAdjoint, typename Change>
__device__ __forceinline__ void interpolate(const float* low, float* fine, int height, int width, Change&& change) {
    const int rows = (height + 1) / 2, columns = (width + 1) / 2;
    for_each(rows, columns, [&](int i, int j) {
        float even[3], odd[3];  // of the low rows i-1, i, i+1
#pragma unroll
        for (int k = 0; k < 3; ++k) {
            const auto at = [&](int column) {
                const int row = i + k - 1;
                if (kAdjoint && (row < 0 || row >= rows || column < 0 || column >= columns)) return 0.0f;
                return low[clamped(row, rows) * columns + clamped(column, columns)];
            };
            const float a = at(j - 1), b = at(j), c = at(j + 1);
            even[k] = interpolate_even<kAdjoint>(a, b, c, 2 * j, width);
            odd[k] = interpolate_odd<kAdjoint>(b, c, 2 * j + 1, width);
        }
        const auto put = [&](int row, int column, float v) {
            if (row < height && column < width) fine[row * width + column] = change(fine[row * width + column], v);
        };
        put(2 * i, 2 * j, interpolate_even<kAdjoint>(even[0], even[1], even[2], 2 * i, height));
        put(2 * i, 2 * j + 1, interpolate_even<kAdjoint>(odd[0], odd[1], odd[2], 2 * i, height));
        put(2 * i + 1, 2 * j, interpolate_odd<kAdjoint>(even[1], even[2], 2 * i + 1, height));
        put(2 * i + 1, 2 * j + 1, interpolate_odd<kAdjoint>(odd[1], odd[2], 2 * i + 1, height));
    });
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads) tail_levels(const __grid_constant__ Tail a) {
    extern __shared__ float shared[];
    float* half = shared + a.scratch;
    const int size = a.height[0] * a.width[0], last = a.count - 1;
    float* level = a.level + static_cast<std::int64_t>(blockIdx.x) * size;
    wait_for_previous();
    for (int i = threadIdx.x; i < size; i += kThreads) shared[i] = level[i];
    __syncthreads();
    float sum = 0;
    for (int j = 0; j < last; ++j) {  // a level becomes its slopes
        float *fine = shared + a.offset[j], *low = shared + a.offset[j + 1];
        const int low_width = a.width[j + 1];
        decimate_rows<false>(fine, a.height[j], a.width[j], half);
        __syncthreads();
        decimate_columns<false>(half, a.height[j], low_width,
                                [&](int i, int k, float v) { low[i * low_width + k] = v / 256; });
        __syncthreads();
        interpolate<false>(low, fine, a.height[j], a.width[j], [&](float f, float v) {
            float band = f - v / 64;
            sum = fmaf(a.scale[j], a.rho(band), sum);
            return band;
        });
    }
    __syncthreads();
    float* residual = shared + a.offset[last];
    for (int i = threadIdx.x; i < a.height[last] * a.width[last]; i += kThreads) {
        float v = residual[i];
        sum = fmaf(a.scale[last], a.rho(v), sum);
        residual[i] = a.scale[last] * v;
    }
    sum = block_sum<kThreads>(sum);  // its barrier lies between the residual and what reads it
    if (threadIdx.x == 0) a.partial[blockIdx.x] = sum;
    if (!a.keep) return;
    for (int j = last - 1; j >= 0; --j) {  // slopes become d loss / d level
        float *fine = shared + a.offset[j], *low = shared + a.offset[j + 1];
        const int low_width = a.width[j + 1];
        const float scale = a.scale[j];
        decimate_rows<true>(fine, a.height[j], a.width[j], half);
        __syncthreads();
        decimate_columns<true>(half, a.height[j], low_width, [&](int i, int k, float v) {
            low[i * low_width + k] = fmaf(-scale / 64, v, low[i * low_width + k]);
        });
        __syncthreads();
        interpolate<true>(low, fine, a.height[j], a.width[j],
                          [&](float slope, float v) { return fmaf(scale, slope, v / 256); });
        __syncthreads();
    }
    for (int i = threadIdx.x; i < size; i += kThreads) level[i] = shared[i];
}

}  // namespace clone_fast::pyramid

// The kernels of laplacian_pyramid that go down one level and up one level, tile by tile.
#pragma once

#include "laplacian_pyramid_tile.cuh"

namespace clone_fast::pyramid {

// ---- down one level ----------------------------------------------------------------------------------------------

struct Down {
    const void *x, *y;  // the level is x - y; y is null below the top, where the level itself is given
    ImageStrides x_strides, y_strides;
    int channels;
    Level level;
    bool vectors;  // four neighbours of a row may be loaded at once, from x and from y
    bool last;     // no level below: the band is the level itself
    Rho rho;
    float scale;     // weight / number of elements
    float* low;      // the level below, [planes, h, w]
    void* slope;     // rho' of the band, [planes, H, W], or null
    float* partial;  // one sum of scale * rho for each block
};

template <typename T>
__device__ __forceinline__ const T* plane_of(const void* x, const ImageStrides& s, int n, int c) {
    return static_cast<const T*>(x) + n * s.n + c * s.c;
}

// x - y at rows and columns clamped into the image -> fine.
template <typename T, bool kDifference, class Tile>
__device__ __forceinline__ void load_difference(Tile& tile, const Down& a, const Place<Tile>& at) {
    const int n = at.group * Tile::planes / a.channels, c = at.group * Tile::planes % a.channels;
    const T* x = plane_of<T>(a.x, a.x_strides, n, c);
    const T* y = kDifference ? plane_of<T>(a.y, a.y_strides, n, c) : nullptr;
    const int top = at.y0 - 4, left = at.x0 - 4, height = a.level.height, width = a.level.width;
    if (Tile::planes == 1 && !a.vectors) {
        constexpr int items = Tile::planes * Tile::fine_rows * Tile::pitch;
        float* fine = &tile.fine[0][0][0];
#pragma unroll 4
        for (int item = threadIdx.x; item < items; item += Tile::threads) {
            const int plane = item / (Tile::fine_rows * Tile::pitch), rest = item % (Tile::fine_rows * Tile::pitch);
            const std::int64_t row = clamped(top + rest / Tile::pitch, height);
            const std::int64_t column = clamped(left + rest % Tile::pitch, width);
            float v = to_float(x[plane * a.x_strides.c + row * a.x_strides.h + column * a.x_strides.w]);
            if constexpr (kDifference) {
                v -= to_float(y[plane * a.y_strides.c + row * a.y_strides.h + column * a.y_strides.w]);
            }
            fine[item] = v;
        }
        return;
    }
    // A row of the tile is `planes` numbers for each pixel, in memory as here; W % 4 == 0, so that four of them lie
    // inside the image or outside.
    constexpr int fours = Tile::planes * Tile::pitch / 4, items = Tile::fine_rows * fours;
    constexpr int count = ceil_div(items, Tile::threads);
    typename Four<T>::Bytes raw_x[count] = {}, raw_y[count] = {};
#pragma unroll
    for (int k = 0; k < count; ++k) {
        const int item = threadIdx.x + k * Tile::threads;
        const std::int64_t row = clamped(top + item / fours, height);
        const int column = left * Tile::planes + item % fours * 4;
        if (item < items && column >= 0 && column < width * Tile::planes) {
            raw_x[k] = Four<T>::load(x + row * a.x_strides.h + column);
            if constexpr (kDifference) raw_y[k] = Four<T>::load(y + row * a.y_strides.h + column);
        }
    }
#pragma unroll
    for (int k = 0; k < count; ++k) {
        const int item = threadIdx.x + k * Tile::threads;
        const int row = item / fours, first = item % fours * 4;
        float v[4], w[4];
        Four<T>::unpack(raw_x[k], v);
        if constexpr (kDifference) {
            Four<T>::unpack(raw_y[k], w);
#pragma unroll
            for (int i = 0; i < 4; ++i) v[i] -= w[i];
        }
        if (item >= items) continue;
        if constexpr (Tile::planes == 1) {
            *reinterpret_cast<float4*>(&tile.fine[0][row][first]) = make_float4(v[0], v[1], v[2], v[3]);
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) tile.fine[(first + i) % Tile::planes][row][(first + i) / Tile::planes] = v[i];
        }
    }
    const int end = min(width - left, Tile::pitch);  // the first column right of the image
    if (left >= 0 && end == Tile::pitch) return;
    __syncthreads();
    for (int item = threadIdx.x; item < Tile::planes * Tile::fine_rows; item += Tile::threads) {
        float* row = &tile.fine[0][0][0] + item * Tile::pitch;
        for (int i = 0; i < -left; ++i) row[i] = row[-left];
        for (int i = end; i < Tile::pitch; ++i) row[i] = row[end - 1];
    }
}

template <typename T, bool kDifference, class Tile>
__global__ void __launch_bounds__(Tile::threads) down_level(const __grid_constant__ Down a) {
    __shared__ __align__(16) Tile tile;
    const Place<Tile> at(a.level);
    const int first_row = at.y0 / 2 - 1, first_column = at.x0 / 2 - 1;
    const int height = a.level.low_height(), width = a.level.low_width();
    wait_for_previous();
    load_difference<T, kDifference>(tile, a, at);
    float sum = 0;
    for (int plane = 0; plane < Tile::planes; ++plane) {
        const std::int64_t p = static_cast<std::int64_t>(at.group) * Tile::planes + plane;
        __syncthreads();
        if (!a.last) {
            decimate_rows<false>(tile, plane, first_column, width);
            __syncthreads();
        }
        for (int item = threadIdx.x; item < Tile::low_rows * Tile::low_pitch; item += Tile::threads) {
            const int i = item / Tile::low_pitch, j = item % Tile::low_pitch;
            const int row = clamped(first_row + i, height), column = clamped(first_column + j, width);
            float v = 0;
            if (!a.last) {
                v = decimate_column<false>(tile, row - first_row, column - first_column, first_row, height) / 256;
                const bool own = i > 0 && j > 0 && i <= Tile::height / 2 && j <= Tile::width / 2;
                if (own && row == first_row + i && column == first_column + j) a.low[(p * height + row) * width + column] = v;
            }
            tile.low[i][j] = v;
        }
        __syncthreads();
        interpolate<false>(tile, at.y0, at.x0, a.level, [&](int r, int c, float(&v)[4]) {
            const int row = at.y0 + r, column = at.x0 + c;
            const float4 f = *reinterpret_cast<const float4*>(&tile.fine[plane][r + 4][c + 4]);
            v[0] = f.x - v[0] / 64, v[1] = f.y - v[1] / 64, v[2] = f.z - v[2] / 64, v[3] = f.w - v[3] / 64;
            if (row >= a.level.height) return;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float value = a.rho(v[i]);
                if (column + i < a.level.width) sum += value;
            }
            if (a.slope == nullptr) return;
            const std::int64_t to = (p * a.level.height + row) * a.level.width + column;
            if (a.level.width % 4 == 0) {
                if (column < a.level.width) store_slopes(a.slope, to, v, a.rho.absolute());
                return;
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (column + i < a.level.width) store_slope(a.slope, to + i, v[i], a.rho.absolute());
            }
        });
    }
    sum = block_sum<Tile::threads>(sum);
    if (threadIdx.x == 0) a.partial[blockIdx.x] = a.scale * sum;
}

// The last level where it is too large for the shared memory of one block: d loss / d level in place of the level.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) residual_level(float* level, std::int64_t count, Rho rho, float scale,
                                                           float* partial) {
    wait_for_previous();
    float sum = 0;
    const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
    for (std::int64_t i = blockIdx.x * std::int64_t{kThreads} + threadIdx.x; i < count; i += step) {
        float v = level[i];
        sum += rho(v);
        level[i] = scale * v;
    }
    sum = block_sum<kThreads>(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = scale * sum;
}

// ---- the loss ----------------------------------------------------------------------------------------------------

struct Sum {
    const float* partial;
    std::int64_t count;
    float constant;
    float* loss;  // null: nothing to be done
};

// One block: loss = constant + the sum of all partial sums, in a fixed order.
template <int kThreads>
__device__ __forceinline__ void sum_partials(const Sum& a) {
    float sum = 0;
#pragma unroll 8
    for (std::int64_t i = threadIdx.x; i < a.count; i += kThreads) sum += a.partial[i];
    sum = block_sum<kThreads>(sum);
    if (threadIdx.x == 0) *a.loss = a.constant + sum;
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads) sum_loss(const __grid_constant__ Sum a) {
    wait_for_previous();
    sum_partials<kThreads>(a);
}

// ---- up one level ------------------------------------------------------------------------------------------------

// out = gain * (g + reduce^T(coarse - expand^T(g))) with g = scale * slope.
struct Up {
    const void* slope;    // [planes, H, W]
    const float* coarse;  // [planes, h, w]
    const float* gain;    // null: 1
    bool last;            // no level below: out = gain * g
    bool absolute;        // slopes are int8
    float scale;
    void* out;
    ImageStrides strides;
    int channels;
    bool vectors;  // four neighbours of a row may be stored at once
    Level level;
    Sum sum;  // done by one more block
};

// Slopes, zero outside the image -> fine.
template <class Tile>
__device__ __forceinline__ void load_slope_tile(Tile& tile, const Up& a, const Place<Tile>& at) {
    const int height = a.level.height, width = a.level.width;
    const std::int64_t plane_size = static_cast<std::int64_t>(height) * width;
    const int step = width % 4 == 0 ? 4 : 1;
    const auto fill = [&](auto tag) {
        constexpr int lanes = decltype(tag)::value, per_row = Tile::pitch / lanes, per_plane = Tile::fine_rows * per_row;
        constexpr int items = Tile::planes * per_plane, count = ceil_div(items, Tile::threads);
        constexpr int batch = count < 6 ? count : 6;  // loads in flight
        for (int start = 0; start < count; start += batch) {
            float4 v[batch];
#pragma unroll
            for (int k = 0; k < batch; ++k) {
                const int item = threadIdx.x + (start + k) * Tile::threads;
                const int row = at.y0 - 4 + item % per_plane / per_row, column = at.x0 - 4 + item % per_row * lanes;
                v[k] = make_float4(0, 0, 0, 0);
                if (item >= items || row < 0 || row >= height || column < 0 || column >= width) continue;
                const std::int64_t p = static_cast<std::int64_t>(at.group) * Tile::planes + item / per_plane;
                const std::int64_t from = p * plane_size + static_cast<std::int64_t>(row) * width + column;
                if constexpr (lanes == 4) v[k] = load_slopes(a.slope, from, a.absolute);
                else v[k].x = load_slope(a.slope, from, a.absolute);
            }
#pragma unroll
            for (int k = 0; k < batch; ++k) {
                const int item = threadIdx.x + (start + k) * Tile::threads;
                float* to = &tile.fine[0][0][0] + item * lanes;
                if (item >= items) continue;
                if constexpr (lanes == 4) *reinterpret_cast<float4*>(to) = v[k];
                else *to = v[k].x;
            }
        }
    };
    if (step == 4) fill(std::integral_constant<int, 4>{});
    else fill(std::integral_constant<int, 1>{});
}

template <typename T, class Tile>
__global__ void __launch_bounds__(Tile::threads) up_level(const __grid_constant__ Up a) {
    __shared__ __align__(16) Tile tile;
    wait_for_previous();
    if (a.sum.loss != nullptr && blockIdx.x == gridDim.x - 1) return sum_partials<Tile::threads>(a.sum);
    const Place<Tile> at(a.level);
    const int first_row = at.y0 / 2 - 1, first_column = at.x0 / 2 - 1;
    const int height = a.level.low_height(), width = a.level.low_width();
    constexpr int low_items = Tile::low_rows * Tile::low_pitch, low_count = ceil_div(low_items, Tile::threads);
    const float gain = a.gain == nullptr ? 1.0f : *a.gain;
    load_slope_tile(tile, a, at);
    T* out = static_cast<T*>(a.out) + (at.group * Tile::planes / a.channels) * a.strides.n +
             (at.group * Tile::planes % a.channels) * a.strides.c;
    for (int plane = 0; plane < Tile::planes; ++plane) {
        const float* coarse = a.coarse + (static_cast<std::int64_t>(at.group) * Tile::planes + plane) * height * width;
        float u[low_count];  // asked for before the barriers
#pragma unroll
        for (int k = 0; k < low_count; ++k) {
            const int item = threadIdx.x + k * Tile::threads;
            const int row = first_row + item / Tile::low_pitch, column = first_column + item % Tile::low_pitch;
            const bool inside = !a.last && item < low_items && row >= 0 && row < height && column >= 0 && column < width;
            u[k] = inside ? coarse[static_cast<std::int64_t>(row) * width + column] : 0.0f;
        }
        __syncthreads();
        decimate_rows<true>(tile, plane, first_column, width);
        __syncthreads();
#pragma unroll
        for (int k = 0; k < low_count; ++k) {
            const int item = threadIdx.x + k * Tile::threads, i = item / Tile::low_pitch, j = item % Tile::low_pitch;
            if (item >= low_items) continue;
            const int row = first_row + i, column = first_column + j;
            const bool inside = !a.last && row >= 0 && row < height && column >= 0 && column < width;
            const float low = decimate_column<true>(tile, i, j, first_row, height);
            tile.low[i][j] = inside ? fmaf(-a.scale / 64, low, u[k]) : 0.0f;
        }
        __syncthreads();
        interpolate<true>(tile, at.y0, at.x0, a.level, [&](int r, int c, float(&v)[4]) {
            float* g = &tile.fine[plane][r + 4][c + 4];
#pragma unroll
            for (int i = 0; i < 4; ++i) v[i] = gain * fmaf(a.scale, g[i], v[i] / 256);
            if constexpr (Tile::planes > 1) {
                *reinterpret_cast<float4*>(g) = make_float4(v[0], v[1], v[2], v[3]);  // stored below
                return;
            }
            const int row = at.y0 + r, column = at.x0 + c;
            if (row >= a.level.height) return;
            T* to = out + row * a.strides.h;
            if (a.vectors) {
                if (column < a.level.width) Four<T>::store(to + column, v);
                return;
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (column + i < a.level.width) to[(column + i) * a.strides.w] = from_float<T>(v[i]);
            }
        });
    }
    if constexpr (Tile::planes > 1) {  // the planes of a pixel are neighbours in memory
        __syncthreads();
        constexpr int fours = Tile::width * Tile::planes / 4;
        for (int item = threadIdx.x; item < Tile::height * fours; item += Tile::threads) {
            const int r = item / fours, first = item % fours * 4;
            if (at.y0 + r >= a.level.height || at.x0 * Tile::planes + first >= a.level.width * Tile::planes) continue;
            float v[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) v[i] = tile.fine[(first + i) % Tile::planes][r + 4][(first + i) / Tile::planes + 4];
            Four<T>::store(out + (at.y0 + r) * a.strides.h + at.x0 * Tile::planes + first, v);
        }
    }
}

}  // namespace clone_fast::pyramid

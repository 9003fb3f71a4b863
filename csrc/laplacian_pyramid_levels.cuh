// The kernels of laplacian_pyramid that go down one level and up one level.
#pragma once

#include "laplacian_pyramid_strip.cuh"

namespace clone_fast::pyramid {

// Size of the fine level, and how the blocks share it: strips of 128 columns, tiles of rows.
struct Level {
    int height, width;
    int strips, tiles;

    __device__ __forceinline__ int low_height() const { return (height + 1) / 2; }
    __device__ __forceinline__ int low_width() const { return (width + 1) / 2; }
};

// kWarps warps for each of kPlanes planes, one above the other, with kRows rows each.
template <int kWarps, int kRows, int kPlanes = 1>
struct Tile {
    static constexpr int warps = kWarps, warp_rows = kRows, planes = kPlanes;
    static constexpr int rows = kWarps * kRows, threads = 32 * kWarps * kPlanes;
    static constexpr int resident = 896 / threads;  // blocks of a multiprocessor: 72 registers for each thread
};

// Where this thread stands.
template <class Tile>
struct Place {
    int group;        // of Tile::planes planes
    int y0, x0;       // of the block: first row, and first column, which may lie outside
    int plane, y, x;  // of the thread: plane of the group, first row of the warp, first of four columns
    bool own;         // the columns are this strip's and inside the image

    __device__ __forceinline__ explicit Place(const Level& level) {
        const unsigned row = blockIdx.x / level.strips;
        const int strip = static_cast<int>(blockIdx.x - row * level.strips), lane = threadIdx.x % 32;
        const int warp = static_cast<int>(threadIdx.x) / 32;
        group = static_cast<int>(row / level.tiles);
        y0 = static_cast<int>(row - group * level.tiles) * Tile::rows;
        const bool overlaps = level.strips > 1;
        x0 = overlaps ? strip * kStep - 4 : 0;
        plane = warp / Tile::warps;
        y = y0 + warp % Tile::warps * Tile::warp_rows;
        x = x0 + 4 * lane;
        own = x < level.width && (!overlaps || (lane > 0 && lane < 31));
    }
    __device__ __forceinline__ std::int64_t image() const { return std::int64_t{group} * Tile::planes + plane; }
};

// ---- down one level ----------------------------------------------------------------------------------------------

struct Down {
    const void *x, *y;  // the level is x - y; y is null below the top, where the level itself is given
    ImageStrides x_strides, y_strides;
    int channels;
    Level level;
    bool vectors;  // four neighbours of a row may be loaded at once, from x and from y
    bool last;     // no level below: the band is the level itself
    float eps_squared;
    double scale;     // weight / number of elements
    double squares;   // mse / number of elements, at the top
    float* low;       // the level below, [planes, h, w]
    void* slope;      // rho' of the band, [planes, H, W], or null
    double* partial;  // one sum of scale * rho, and of squares * (x - y)^2, for each block
    int rows;         // of a warp of march_down
};

// x - y, where -0 becomes 0: see Rho::slope.
__device__ __forceinline__ float difference(float x, float y) { return (x - y) + 0.0f; }

// From its threads' sums of rho, and with kSquares of (x - y)^2, the block's.
template <bool kSquares>
__device__ __forceinline__ void write_partial(const Down& a, float sum, float squares) {
    if constexpr (kSquares) {
        const double total = block_sum(a.scale * static_cast<double>(sum) + a.squares * static_cast<double>(squares));
        if (threadIdx.x == 0) a.partial[blockIdx.x] = total;
    } else {
        const double total = block_sum(static_cast<double>(sum));
        if (threadIdx.x == 0) a.partial[blockIdx.x] = a.scale * total;
    }
}

// x - y of the block's tile, four rows more above and three below, repeated outside the image, into shared memory.
template <typename T, bool kDifference, class Tile>
__device__ __forceinline__ void load_difference(float (&fine)[Tile::planes][Tile::rows + 7][kStrip], const Down& a,
                                                const Place<Tile>& at) {
    const int first = at.group * Tile::planes, n = first / a.channels, c = first % a.channels;
    const T* x = static_cast<const T*>(a.x) + n * a.x_strides.n + c * a.x_strides.c;
    const T* y = static_cast<const T*>(a.y) + (kDifference ? n * a.y_strides.n + c * a.y_strides.c : 0);
    const int height = a.level.height, width = a.level.width;
    if (Tile::planes == 1 && !a.vectors) {
#pragma unroll 1
        for (int r = threadIdx.x / 32; r < Tile::rows + 7; r += Tile::threads / 32) {
            const std::int64_t row = clamped(at.y0 - 4 + r, height);
#pragma unroll
            for (int i = threadIdx.x % 32; i < kStrip; i += 32) {
                const std::int64_t column = clamped(at.x0 + i, width);
                float v = to_float(x[row * a.x_strides.h + column * a.x_strides.w]);
                if constexpr (kDifference) v = difference(v, to_float(y[row * a.y_strides.h + column * a.y_strides.w]));
                fine[0][r][i] = v;
            }
        }
        return;
    }
    // A row of the tile is `planes` numbers for each pixel, in memory as here, and width % 4 == 0, so that four of them
    // lie inside the image or outside. What is outside is not read by anybody: see Columns.
    constexpr int fours = Tile::planes * kStrip / 4, step = Tile::threads / fours;
    constexpr int count = ceil_div(Tile::rows + 7, step);
    static_assert(Tile::threads % fours == 0);
    const int four = threadIdx.x % fours, top = threadIdx.x / fours;
    const int column = min(max(at.x0 * Tile::planes + 4 * four, 0), width * Tile::planes - 4);
    constexpr int batch = 6;  // loads in flight for each thread and image
    typename Four<T>::Bytes raw_x[batch], raw_y[batch];
#pragma unroll
    for (int k = 0; k < count; ++k) {
        if (k % batch == 0) {
#pragma unroll
            for (int i = k; i < k + batch && i < count; ++i) {
                const std::int64_t row = clamped(at.y0 - 4 + top + i * step, height);
                raw_x[i % batch] = Four<T>::load(x + row * a.x_strides.h + column);
                if constexpr (kDifference) raw_y[i % batch] = Four<T>::load(y + row * a.y_strides.h + column);
            }
        }
        const int r = top + k * step;
        float v[4], w[4];
        Four<T>::unpack(raw_x[k % batch], v);
        if constexpr (kDifference) {
            Four<T>::unpack(raw_y[k % batch], w);
#pragma unroll
            for (int i = 0; i < 4; ++i) v[i] = difference(v[i], w[i]);
        }
        if (r >= Tile::rows + 7) break;
        if constexpr (Tile::planes == 1) {
            *reinterpret_cast<float4*>(&fine[0][r][4 * four]) = make_float4(v[0], v[1], v[2], v[3]);
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) fine[(4 * four + i) % Tile::planes][r][(4 * four + i) / Tile::planes] = v[i];
        }
    }
}

// kAligned: the level's width is a multiple of 4.
template <typename T, bool kDifference, bool kSquares, bool kAbsolute, bool kAligned, class Tile>
__global__ void __launch_bounds__(Tile::threads, Tile::resident) down_level(const __grid_constant__ Down a) {
    __shared__ __align__(16) float fine[Tile::planes][Tile::rows + 7][kStrip];
    const Place<Tile> at(a.level);
    const Rho<kAbsolute> rho{a.eps_squared};
    const int height = a.level.height, width = a.level.width;
    const int low_height = a.level.low_height(), low_width = a.level.low_width();
    wait_for_previous();
    load_difference<T, kDifference, Tile>(fine, a, at);
    __syncthreads();
    float sum = 0, squares = 0;
    const float* tile = &fine[at.plane][at.y - at.y0][at.x - at.x0];
    float* low = a.low + (at.image() * low_height + at.y / 2) * low_width + at.x / 2;
    auto* slope = static_cast<typename Rho<kAbsolute>::Slope*>(a.slope);
    if (slope != nullptr) slope += (at.image() * height + at.y) * width + at.x;
    const auto row = [&](int r, float (&v)[4]) {
        asm volatile("" ::: "memory");  // do not remember it from the first time: registers are scarcer
        Four<float>::unpack(Four<float>::load(tile + r * kStrip), v);
    };
    const auto put = [&](int t, const float (&v)[2]) {
        if (!at.own || at.y / 2 + t >= low_height) return;
        if constexpr (kAligned) {
            *reinterpret_cast<float2*>(low + t * low_width) = make_float2(v[0], v[1]);
        } else {
            low[t * low_width] = v[0];
            if (at.x / 2 + 1 < low_width) low[t * low_width + 1] = v[1];
        }
    };
    const auto use = [&](int r, const float (&band)[4]) {
        if (!at.own || at.y + r >= height) return;
        if constexpr (kAligned) {
            sum += (rho(band[0]) + rho(band[1])) + (rho(band[2]) + rho(band[3]));
            if (slope != nullptr) store_slopes(slope + r * width, band, rho);
            if constexpr (kSquares) {
                float d[4];
                row(r + 4, d);
                squares += sum_of_squares(d);
            }
        } else {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                if (at.x + k >= width) break;
                sum += rho(band[k]);
                if (slope != nullptr) slope[r * width + k] = rho.slope(band[k]);
                if constexpr (kSquares) {
                    const float d = tile[(r + 4) * kStrip + k];
                    squares = fmaf(d, d, squares);
                }
            }
        }
    };
    if (a.last) {
#pragma unroll 1
        for (int r = 0; r < Tile::warp_rows; ++r) {
            float band[4];
            row(r + 4, band);
            use(r, band);
        }
    } else {
        strip_down<Tile::warp_rows>(Columns<false>(at.x, width), at.y, height, row, put, use);
    }
    write_partial<kSquares>(a, sum, squares);
}

// The last level where it is too large for the shared memory of one block: d loss / d level in place of the level.
template <bool kAbsolute, int kThreads>
__global__ void __launch_bounds__(kThreads)
    residual_level(float* level, std::int64_t count, Rho<kAbsolute> rho, double scale, double* partial) {
    wait_for_previous();
    float sum = 0;
    const float factor = static_cast<float>(scale);
    const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
    for (std::int64_t i = blockIdx.x * std::int64_t{kThreads} + threadIdx.x; i < count; i += step) {
        const float v = level[i];
        sum += rho(v);
        level[i] = factor * rho.slope(v);
    }
    const double total = block_sum(static_cast<double>(sum));
    if (threadIdx.x == 0) partial[blockIdx.x] = scale * total;
}

// ---- the loss ----------------------------------------------------------------------------------------------------

struct Sum {
    const double* partial;
    std::int64_t count;
    double constant;
    float* loss;  // null: nothing to be done
};

// One block: loss = constant + the sum of all partial sums, in a fixed order.
__device__ __forceinline__ void sum_partials(const Sum& a) {
    wait_for_previous();
    double sum = 0;
#pragma unroll 4
    for (std::int64_t i = threadIdx.x; i < a.count; i += blockDim.x) sum += a.partial[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *a.loss = static_cast<float>(a.constant + sum);
}

static __global__ void sum_loss(const __grid_constant__ Sum a) { sum_partials(a); }

// ---- up one level ------------------------------------------------------------------------------------------------

// out = gain * (g + reduce^T(coarse - expand^T(g)) + squares * (x - y)) with g = scale * slope.
struct Up {
    const void* slope;    // [planes, H, W]
    const float* coarse;  // [planes, h, w]; null: no level below, out = gain * g
    const float* gain;    // null: 1
    float scale;
    void* out;
    ImageStrides strides;
    float squares;      // 2 mse / number of elements
    const void *x, *y;  // [N, C, H, W] as `out`, read for the squares alone
    ImageStrides x_strides, y_strides;
    int channels;
    Level level;
    Sum sum;   // done by one more block
    int rows;  // of a warp of march_up
};

// kCount rows of slopes from row `top` of a plane on, zero outside the image, as they lie in memory.
template <bool kAbsolute, bool kAligned, int kCount>
struct SlopeRows {
    using Slope = typename Rho<kAbsolute>::Slope;
    static constexpr bool packed = kAbsolute && kAligned;

    std::conditional_t<packed, unsigned, float4> rows[kCount];

    __device__ __forceinline__ SlopeRows(const void* slope, const Level& level, std::int64_t plane, int top, int x) {
        const int height = level.height, width = level.width;
        const Slope* from = static_cast<const Slope*>(slope) + (plane * height + top) * width + x;
        const bool inside = x >= 0 && x < width;
#pragma unroll
        for (int r = 0; r < kCount; ++r) {
            const bool row = top + r >= 0 && top + r < height;
            if constexpr (packed) {
                rows[r] = 0;
                if (row && inside) rows[r] = *reinterpret_cast<const unsigned*>(from + r * width);
            } else if constexpr (kAligned) {
                rows[r] = make_float4(0, 0, 0, 0);
                if (row && inside) rows[r] = *reinterpret_cast<const float4*>(from + r * width);
            } else {
                float v[4];
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    v[k] = row && x + k >= 0 && x + k < width ? static_cast<float>(from[r * width + k]) : 0.0f;
                }
                rows[r] = make_float4(v[0], v[1], v[2], v[3]);
            }
        }
    }
    __device__ __forceinline__ void operator()(int r, float (&v)[4]) const {
        if constexpr (packed) unpack_signs(rows[r], v);
        else Four<float>::unpack(rows[r], v);
    }
};

// kAligned: width is a multiple of 4, and where one plane is one block's, four neighbours of a row may be stored at
// once, and with kSquares loaded of x and y.
template <typename T, bool kSquares, bool kAbsolute, bool kAligned, class Tile>
__global__ void __launch_bounds__(Tile::threads, kAbsolute ? Tile::resident : 512 / Tile::threads)
    up_level(const __grid_constant__ Up a) {
    // Where the planes of a pixel are neighbours in memory, they meet here before they are stored.
    constexpr int staged_rows = Tile::planes > 1 ? Tile::rows : 1;
    __shared__ __align__(16) float staged[staged_rows][kStrip * Tile::planes];
    if (a.sum.loss != nullptr && blockIdx.x == gridDim.x - 1) return sum_partials(a.sum);
    const Place<Tile> at(a.level);
    const int height = a.level.height, width = a.level.width;
    const int low_height = a.level.low_height(), low_width = a.level.low_width();
    const int first = at.group * Tile::planes;
    T* out = static_cast<T*>(a.out) + first / a.channels * a.strides.n + first % a.channels * a.strides.c;
    T* own_out = out + at.y * a.strides.h + at.x * a.strides.w;
    const int row_stride = static_cast<int>(a.strides.h);
    const auto image = [&](const void* from, const ImageStrides& s) {
        return static_cast<const T*>(from) + first / a.channels * s.n + first % a.channels * s.c;
    };
    [[maybe_unused]] const T* from_x = kSquares ? image(a.x, a.x_strides) : nullptr;
    [[maybe_unused]] const T* from_y = kSquares ? image(a.y, a.y_strides) : nullptr;
    wait_for_previous();
    const float gain = a.gain == nullptr ? 1.0f : *a.gain, squares = gain * a.squares;
    const SlopeRows<kAbsolute, kAligned, Tile::warp_rows + 7> row(a.slope, a.level, at.image(), at.y - 4, at.x);
    const float* low = a.coarse + (at.image() * low_height + at.y / 2 - 1) * low_width + at.x / 2;
    const auto coarse = [&](int t, float (&v)[2]) {
        const int i = at.y / 2 - 1 + t, k = at.x / 2;
        const bool inside = i >= 0 && i < low_height && at.x >= 0;
        v[0] = v[1] = 0;
        if (inside && k < low_width) v[0] = low[t * low_width];
        if (inside && k + 1 < low_width) v[1] = low[t * low_width + 1];
    };
    const auto use = [&](int r, float (&v)[4]) {
        if (!at.own || at.y + r >= height) return;
        if constexpr (Tile::planes > 1) {
            float* to = &staged[at.y - at.y0 + r][(at.x - at.x0) * Tile::planes + at.plane];
#pragma unroll
            for (int k = 0; k < 4; ++k) to[k * Tile::planes] = v[k];
        } else if constexpr (kAligned) {
            if constexpr (kSquares) {
                add_difference<T>(v, squares, Four<T>::load(from_x + (at.y + r) * a.x_strides.h + at.x),
                                  Four<T>::load(from_y + (at.y + r) * a.y_strides.h + at.x));
            }
            Four<T>::store(own_out + r * row_stride, v);
        } else {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                if constexpr (kSquares) {
                    const std::int64_t row = at.y + r, column = min(at.x + k, width - 1);
                    v[k] = fmaf(squares,
                                to_float(from_x[row * a.x_strides.h + column * a.x_strides.w]) -
                                    to_float(from_y[row * a.y_strides.h + column * a.y_strides.w]),
                                v[k]);
                }
                if (at.x + k < width) own_out[r * a.strides.h + k * a.strides.w] = from_float<T>(v[k]);
            }
        }
    };
    if (a.coarse == nullptr) {
#pragma unroll
        for (int r = 0; r < Tile::warp_rows; ++r) {
            float v[4];
            row(r + 4, v);
#pragma unroll
            for (int k = 0; k < 4; ++k) v[k] *= gain * a.scale;
            use(r, v);
        }
    } else {
        strip_up<Tile::warp_rows>(Columns<true>(at.x, width), at.y, height, gain * a.scale, gain, row, coarse, use);
    }
    if constexpr (Tile::planes > 1) {
        __syncthreads();
        constexpr int fours = Tile::planes * kStrip / 4;
        const int four = threadIdx.x % fours,
                  pixel = 4 * four / Tile::planes;  // width % 4 == 0: as its neighbours in x
        const int x = at.x0 + pixel / 4 * 4;
        if (x < 0 || x >= width || (a.level.strips > 1 && (pixel < 4 || pixel >= kStrip - 4))) return;
        for (int r = threadIdx.x / fours; r < Tile::rows && at.y0 + r < height; r += Tile::threads / fours) {
            float v[4];
            Four<float>::unpack(Four<float>::load(&staged[r][4 * four]), v);
            if constexpr (kSquares) {
                const int row = at.y0 + r, column = at.x0 * Tile::planes + 4 * four;
                add_difference<T>(v, squares, Four<T>::load(from_x + row * a.x_strides.h + column),
                                  Four<T>::load(from_y + row * a.y_strides.h + column));
            }
            Four<T>::store(out + (at.y0 + r) * a.strides.h + at.x0 * Tile::planes + 4 * four, v);
        }
    }
}

}  // namespace clone_fast::pyramid

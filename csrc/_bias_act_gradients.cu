// bias_act's gradient together with the sum for the bias: dx is written once, and what it adds up to per channel goes to
// a small workspace that a second kernel sums. No atomics: the order of summation is always the same.
//
// Two kernels, for two ways in which memory may lie:
//   rows     [rows, columns]: the channel is the column (channels_last, matrices). A thread keeps its columns.
//   planes   [planes, inner]: the channel is plane % channels (contiguous images). A group of threads keeps its plane.
#include <algorithm>
#include <numeric>

#include "_bias_act.cuh"

namespace clone_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 2;
// How finely the work is cut. Each block of rows leaves a sum for every column, and these have to be summed again.
constexpr int kRowBlocksPerProcessor = 4, kPlaneBlocksPerProcessor = 8;
constexpr int kSumThreads = 1024;

// kWidth elements that one thread moves at once: 16 bytes, or a single element where memory is not aligned to that.
template <typename T, int kWidth>
struct Lanes {
    using Raw = std::conditional_t<kWidth == 1, T, Bytes16>;

    static __device__ __forceinline__ Raw load(const T* from) {
        if constexpr (kWidth == 1) return *from;
        else return load16(from);
    }
    static __device__ __forceinline__ void numbers(Raw raw, float (&values)[kWidth]) {
        if constexpr (kWidth == 1) values[0] = to_float(raw);
        else unpack<T>(raw, values);
    }
    static __device__ __forceinline__ void store(T* to, const float (&values)[kWidth]) {
        if constexpr (kWidth == 1) *to = from_float<T>(values[0]);
        else store16(to, pack<T>(values));
    }
};

template <typename T>
struct Tensors {
    const T *dy, *x, *b;
    T* dx;
    float* partial;
};

// dx at kUnroll vectors, `stride` vectors apart, as far as they lie before `count`; adds it to sum.
template <typename T, int kWidth, bool kRectified>
__device__ __forceinline__ void step(const Formula& f, const Tensors<T>& t, std::size_t offset, std::size_t stride,
                                     int count, const float (&bias)[kWidth], float (&sum)[kWidth]) {
    using Vector = Lanes<T, kWidth>;
    typename Vector::Raw dy[kUnroll], x[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
        if (u < count) {
            dy[u] = Vector::load(t.dy + (offset + u * stride) * kWidth);
            x[u] = Vector::load(t.x + (offset + u * stride) * kWidth);
        }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
        if (u < count) {
            float numbers[kWidth], z[kWidth];
            Vector::numbers(dy[u], numbers);
            Vector::numbers(x[u], z);
#pragma unroll
            for (int l = 0; l < kWidth; ++l) {
                numbers[l] = gradient<kRectified>(f, numbers[l], z[l] + bias[l]);
                sum[l] += numbers[l];
            }
            Vector::store(t.dx + (offset + u * stride) * kWidth, numbers);
        }
    }
}

// ---- rows

struct Rows {
    int rows, columns;  // columns in vectors
    int channels;       // the channel of column c is c % channels, in elements
    int tile;           // columns of a block, at most 32
    int chunk;          // rows of a block
};

template <typename T, int kWidth, bool kRectified>
__global__ void __launch_bounds__(kThreads, 4) gradients_rows(Formula f, Rows shape, Tensors<T> t) {
    __shared__ float sums[kThreads * kWidth];
    let_next_come();
    const int together = kThreads / shape.tile;  // rows that the block covers at a time
    const int row = threadIdx.x / shape.tile, column = threadIdx.x - row * shape.tile;
    const int vector = blockIdx.x * shape.tile + column;
    float bias[kWidth], sum[kWidth] = {};
    if (row < together && vector < shape.columns) {
#pragma unroll
        for (int l = 0; l < kWidth; ++l) bias[l] = to_float(t.b[(vector * kWidth + l) % shape.channels]);
        const int end = min(shape.rows, static_cast<int>(blockIdx.y + 1) * shape.chunk);
        for (int r = blockIdx.y * shape.chunk + row; r < end; r += kUnroll * together) {
            step<T, kWidth, kRectified>(f, t, static_cast<std::size_t>(r) * shape.columns + vector,
                                        static_cast<std::size_t>(together) * shape.columns,
                                        ceil_div(end - r, together), bias, sum);
        }
    }
    // [together][width] -> [parts][width] -> [width]
    const int width = shape.tile * kWidth, parts = kThreads / width;
    const int k = threadIdx.x % width, part = threadIdx.x / width;
#pragma unroll
    for (int l = 0; l < kWidth; ++l) {
        if (row < together) sums[row * width + column * kWidth + l] = sum[l];
    }
    __syncthreads();
    float total = 0.0f;
    if (part < parts) {
        for (int r = part; r < together; r += parts) total += sums[r * width + k];
    }
    __syncthreads();
    sums[threadIdx.x] = total;
    __syncthreads();
    const int element = blockIdx.x * width + k, elements = shape.columns * kWidth;
    if (part == 0 && element < elements) {
        for (int p = 1; p < parts; ++p) total += sums[p * width + k];
        t.partial[static_cast<std::size_t>(blockIdx.y) * elements + element] = total;
    }
}

// ---- planes

struct Planes {
    int outer, channels, vectors;  // vectors of a plane
    int group;                     // threads that share a plane: a power of two up to 32, or the block
    int chunk, chunks;             // where it is the block: vectors of a block, and blocks of a plane
    int several;                   // where it is not: how many planes of its channel the group takes
};

template <typename T, int kWidth, bool kRectified>
__global__ void __launch_bounds__(kThreads, 4) gradients_planes(Formula f, Planes shape, Tensors<T> t) {
    let_next_come();
    const bool is_block = shape.group == kThreads;
    const int of_block = is_block ? blockIdx.x / shape.chunks : blockIdx.x * (kThreads / shape.group);
    const int place = of_block + threadIdx.x / shape.group, lane = threadIdx.x % shape.group;
    const int piece = is_block ? blockIdx.x - of_block * shape.chunks : 0;
    const int part = place / shape.channels, channel = place - part * shape.channels;
    const int first = part * shape.several, last = min(shape.outer, first + shape.several);
    float total = 0.0f;
    if (first < last) {
        float bias[kWidth], sum[kWidth] = {};
        const float same = to_float(t.b[channel]);
#pragma unroll
        for (int l = 0; l < kWidth; ++l) bias[l] = same;
        const int end = min(shape.vectors, (piece + 1) * shape.chunk);
        for (int outer = first; outer < last; ++outer) {
            const std::size_t plane = static_cast<std::size_t>(outer) * shape.channels + channel;
            for (int v = piece * shape.chunk + lane; v < end; v += kUnroll * shape.group) {
                step<T, kWidth, kRectified>(f, t, plane * shape.vectors + v, shape.group,
                                            ceil_div(end - v, shape.group), bias, sum);
            }
        }
#pragma unroll
        for (int l = 0; l < kWidth; ++l) total += sum[l];
    }
    if (is_block) {
        total = block_sum<kThreads>(total);
    } else {
        for (int offset = shape.group / 2; offset > 0; offset /= 2) {
            total += __shfl_xor_sync(0xffffffffu, total, offset);
        }
    }
    if (lane == 0 && first < last) {
        t.partial[(static_cast<std::size_t>(part) * shape.chunks + piece) * shape.channels + channel] = total;
    }
}

// ---- the sum of what the blocks have found: partial [count, channels] -> db [channels]

template <typename T>
__global__ void __launch_bounds__(kSumThreads) sum_partials(const float* partial, int count, int channels, int tile, T* db) {
    __shared__ float sums[kSumThreads];
    wait_for_previous();
    const int column = threadIdx.x % tile, row = threadIdx.x / tile, rows = kSumThreads / tile;
    const int channel = blockIdx.x * tile + column;
    float total = 0.0f;
    if (channel < channels) {
#pragma unroll 8
        for (int i = row; i < count; i += rows) total += partial[static_cast<std::size_t>(i) * channels + channel];
    }
    sums[threadIdx.x] = total;
    for (int half = kSumThreads / 2; half >= tile; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (row == 0 && channel < channels) db[channel] = from_float<T>(sums[column]);
}

// ---- which of the two, and how it is cut: everything but pointers

struct Plan {
    bool is_rows = false, is_wide = true;  // wide: 16 bytes at once
    Rows rows{};
    Planes planes{};
    dim3 grid;
    std::int64_t partials = 0;  // how many sums for each channel
};

Plan plan(const BiasAct& op, bool aligned) {
    const int lanes = op.dtype == Dtype::float32 ? 4 : 8;
    Plan p;
    p.is_rows = op.inner == 1;
    const std::int64_t blocks =
        std::int64_t{multiprocessors(kBiasAct)} * (p.is_rows ? kRowBlocksPerProcessor : kPlaneBlocksPerProcessor);
    if (p.is_rows) {
        // Several rows count as one where that makes it a whole number of vectors: RGB in channels_last.
        const std::int64_t fold = lanes / std::gcd<std::int64_t>(op.channels, lanes);
        p.is_wide = aligned && op.outer % fold == 0;
        const std::int64_t rows = p.is_wide ? op.outer / fold : op.outer;
        const std::int64_t columns = p.is_wide ? op.channels * fold / lanes : op.channels;
        const std::int64_t tiles = ceil_div(columns, 32), tile = ceil_div(columns, tiles);
        const std::int64_t step = kUnroll * (kThreads / tile);
        // Rounded up, so that all blocks run at once: the few of a second wave would hold up the rest.
        const std::int64_t steps = ceil_div(ceil_div(rows, step) * tiles, blocks);
        const std::int64_t chunk = step * std::max(steps, ceil_div(ceil_div(rows, step), 65535));
        p.rows = {static_cast<int>(rows), static_cast<int>(columns), static_cast<int>(op.channels), static_cast<int>(tile),
                  static_cast<int>(chunk)};
        p.grid = dim3(ceil_div(columns, tile), ceil_div(rows, chunk));
        p.partials = p.grid.y * (p.is_wide ? fold : 1);
        return p;
    }
    p.is_wide = aligned && op.inner % lanes == 0;
    const std::int64_t planes = op.outer * op.channels, vectors = p.is_wide ? op.inner / lanes : op.inner;
    std::int64_t group = 1, chunk = vectors, chunks = 1, several = 1, count;
    if (vectors >= kThreads) {
        const std::int64_t step = kUnroll * kThreads;
        group = kThreads;
        chunk = step * std::max<std::int64_t>(1, planes * vectors / step / blocks);
        chunks = ceil_div(vectors, chunk);
        count = planes * chunks;
    } else {
        while (group < 32 && group < vectors) group *= 2;
        const std::int64_t places = kThreads / group;
        several = std::max<std::int64_t>(1, planes / places / blocks);
        count = ceil_div(ceil_div(op.outer, several) * op.channels, places);
    }
    p.planes = {static_cast<int>(op.outer), static_cast<int>(op.channels), static_cast<int>(vectors),
                static_cast<int>(group), static_cast<int>(chunk), static_cast<int>(chunks), static_cast<int>(several)};
    p.grid = dim3(count);
    p.partials = ceil_div(op.outer, several) * chunks;
    return p;
}

template <typename T, int kWidth, bool kRectified>
void launch(const BiasAct& op, const Plan& p, const Tensors<T>& t, cudaStream_t stream) {
    if (p.is_rows) gradients_rows<T, kWidth, kRectified><<<p.grid, kThreads, 0, stream>>>(Formula(op), p.rows, t);
    else gradients_planes<T, kWidth, kRectified><<<p.grid, kThreads, 0, stream>>>(Formula(op), p.planes, t);
    check_launch(kBiasAct);
}

// The sum may be scheduled while the gradient still runs; it waits inside for its end.
template <typename T>
void launch_sum(const float* partial, std::int64_t count, std::int64_t channels, T* db, cudaStream_t stream) {
    int tile = 1;  // channels of a block: few, so that many blocks share the work
    while (tile < 8 && tile < channels) tile *= 2;
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(ceil_div(channels, tile));
    config.blockDim = dim3(kSumThreads);
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = is_for_hopper(sum_partials<T>, kBiasAct);
    check(cudaLaunchKernelEx(&config, sum_partials<T>, partial, static_cast<int>(count), static_cast<int>(channels), tile,
                             db),
          kBiasAct);
}

}  // namespace

std::int64_t bias_act_partials(const BiasAct& op) {
    return op.channels * std::max(plan(op, true).partials, plan(op, false).partials);
}

void bias_act_gradients(const BiasAct& op, const void* dy, const void* x, const void* b, void* dx, void* db, float* partial,
                        cudaStream_t stream) {
    const Plan p = plan(op, is_aligned(dy) && is_aligned(x) && is_aligned(dx));
    with_dtype(op.dtype, kBiasAct, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const Tensors<T> t{static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<const T*>(b),
                           static_cast<T*>(dx), partial};
        if (!p.is_wide) launch<T, 1, false>(op, p, t, stream);
        else if (Formula::is_rectified(op.act)) launch<T, kLanes<T>, true>(op, p, t, stream);
        else launch<T, kLanes<T>, false>(op, p, t, stream);
        launch_sum(partial, p.partials, op.channels, static_cast<T*>(db), stream);
    });
}

}  // namespace clone_fast

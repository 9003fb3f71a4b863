// bias_act's gradient together with the sum for the bias: dx is written once, and what it adds up to per channel goes to
// a small workspace that a second kernel sums. No atomics: the order of summation is always the same.
//
// Two kernels, for two ways in which memory may lie:
//   rows     [rows, columns]: the channel is the column (channels_last, matrices). A thread keeps its columns.
//   planes   [planes, inner]: the channel is plane % channels (contiguous images). A group of threads keeps its plane.
#include <algorithm>
#include <limits>
#include <numeric>

#include "_bias_act.cuh"

namespace clone_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerProcessor = 4;  // of either kernel, at once
constexpr int kPlaneWaves = 2;          // of them; not of rows, where each block leaves a sum for every column
constexpr int kSumThreads = 512, kSumChannels = 8;  // few channels for each block, so that many share the work

template <typename T>
struct Tensors {
    const T *dy, *x, *b;
    T* dx;
    float* partial;
};

// Where a thread goes: `count` vectors, `stride` apart, and after every `each` of them `jump` further.
struct Steps {
    std::uint32_t first, stride, jump;
    int count, each;
};

template <bool kJumps>
struct Walk {
    std::uint32_t at;
    int left;

    __device__ explicit Walk(const Steps& steps) : at(steps.first), left(steps.each) {}
    __device__ __forceinline__ void next(const Steps& steps) {
        at += steps.stride;
        if (kJumps && --left == 0) left = steps.each, at += steps.jump;
    }
};

// dy and x of one thread's steps, kWidth elements at once: 16 bytes, or a single element where memory is not aligned to
// that. The 16 bytes come by way of shared memory, where those of the next steps wait without registers; nobody else
// reads a thread's, so there is no barrier.
template <typename T, int kWidth>
struct Feed {
    static constexpr int kAhead = kWidth == 1 ? 1 : 3;  // steps whose numbers are on their way
    static constexpr int kSlot = 2 * 16 * kThreads, kBytes = kWidth == 1 ? 0 : (kAhead + 1) * kSlot;
    static_assert((kBytes & (kBytes - 1)) == 0);

    const Tensors<T>& t;
    std::uint32_t slots, slot = 0;  // of the step that is taken; the last one's may still be read while others come
    T now[2], next[2];              // of single elements

    __device__ explicit Feed(const Tensors<T>& t) : t(t) {
        extern __shared__ Bytes16 ring[];  // [kAhead + 1, 2, kThreads]
        slots = shared_address(ring) + 16 * threadIdx.x;
        asm volatile("" : "+r"(slots));  // is not worked out again in every step
    }
    static __device__ __forceinline__ void copy(std::uint32_t to, const T* from) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
    }
    static __device__ __forceinline__ Bytes16 shared16(std::uint32_t address) {
        Bytes16 bytes;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(bytes.x), "=r"(bytes.y), "=r"(bytes.z), "=r"(bytes.w)
                     : "r"(address)
                     : "memory");
        return bytes;
    }
    // The numbers of the step that is `steps` after the one that is taken next, if there is one.
    __device__ __forceinline__ void ask(int steps, bool exists, std::uint32_t vector) {
        const std::size_t offset = std::size_t{vector} * kWidth;
        if constexpr (kWidth > 1) {
            const std::uint32_t to = slots + ((slot + steps * kSlot) & (kBytes - 1));
            if (exists) copy(to, t.dy + offset), copy(to + kSlot / 2, t.x + offset);
            asm volatile("cp.async.commit_group;" ::: "memory");
        } else {
            now[0] = next[0], now[1] = next[1];
            if (exists) next[0] = t.dy[offset], next[1] = t.x[offset];
        }
    }
    __device__ __forceinline__ void take(float (&dy)[kWidth], float (&x)[kWidth]) {
        if constexpr (kWidth > 1) {
            asm volatile("cp.async.wait_group %0;" ::"n"(kAhead) : "memory");
            unpack<T>(shared16(slots + slot), dy);
            unpack<T>(shared16(slots + slot + kSlot / 2), x);
            slot = (slot + kSlot) & (kBytes - 1);
        } else {
            dy[0] = to_float(now[0]), x[0] = to_float(now[1]);
        }
    }
};

// dx of a thread's steps; what it adds up to goes to sum.
template <typename T, int kWidth, bool kRectified, bool kJumps>
__device__ __forceinline__ void run(const Formula& f, const Tensors<T>& t, const Steps& steps,
                                    const float (&bias)[kWidth], float (&sum)[kWidth]) {
    Feed<T, kWidth> feed(t);
    constexpr int kAhead = Feed<T, kWidth>::kAhead;
    Walk<kJumps> asked(steps), at(steps);
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
        feed.ask(s, s < steps.count, asked.at);
        asked.next(steps);
    }
    for (int left = steps.count; left > 0; --left) {
        float numbers[kWidth], z[kWidth];
        feed.ask(kAhead, left > kAhead, asked.at);
        asked.next(steps);
        feed.take(numbers, z);
#pragma unroll
        for (int l = 0; l < kWidth; ++l) {
            numbers[l] = gradient<kRectified>(f, numbers[l], z[l] + bias[l]);
            sum[l] += numbers[l];
        }
        T* to = t.dx + std::size_t{at.at} * kWidth;
        if constexpr (kWidth == 1) *to = from_float<T>(numbers[0]);
        else store16(to, pack<T>(numbers));
        at.next(steps);
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
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) gradients_rows(Formula f, Rows shape, Tensors<T> t) {
    __shared__ float sums[kThreads * kWidth];
    let_next_come();
    const int together = kThreads / shape.tile;  // rows that the block covers at a time
    const int row = threadIdx.x / shape.tile, column = threadIdx.x - row * shape.tile;
    const int vector = blockIdx.x * shape.tile + column;
    float bias[kWidth], sum[kWidth] = {};
    wait_for_previous();
    if (row < together && vector < shape.columns) {
#pragma unroll
        for (int l = 0; l < kWidth; ++l) bias[l] = to_float(t.b[(vector * kWidth + l) % shape.channels]);
        const int first = blockIdx.y * shape.chunk, end = min(shape.rows - first, shape.chunk);
        const int count = end > row ? ceil_div(end - row, together) : 0;
        const Steps steps = {static_cast<std::uint32_t>((first + row) * shape.columns + vector),
                             static_cast<std::uint32_t>(together * shape.columns), 0, count, count};
        run<T, kWidth, kRectified, false>(f, t, steps, bias, sum);
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
    int several;                   // how many planes of its channel the group takes
};

template <typename T, int kWidth, bool kRectified>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) gradients_planes(Formula f, Planes shape, Tensors<T> t) {
    let_next_come();
    const bool is_block = shape.group == kThreads;
    const int of_block = is_block ? blockIdx.x / shape.chunks : blockIdx.x * (kThreads / shape.group);
    const int place = of_block + threadIdx.x / shape.group, lane = threadIdx.x % shape.group;
    const int piece = is_block ? blockIdx.x - of_block * shape.chunks : 0;
    const int part = place / shape.channels, channel = place - part * shape.channels;
    const int first = part * shape.several, planes = min(shape.outer - first, shape.several);
    float total = 0.0f;
    wait_for_previous();
    if (planes > 0) {
        float bias[kWidth], sum[kWidth] = {};
        const float same = to_float(t.b[channel]);
#pragma unroll
        for (int l = 0; l < kWidth; ++l) bias[l] = same;
        const int begin = piece * shape.chunk, end = min(shape.vectors - begin, shape.chunk);
        const int each = end > lane ? ceil_div(end - lane, shape.group) : 0;
        const Steps steps = {static_cast<std::uint32_t>((first * shape.channels + channel) * shape.vectors + begin + lane),
                             static_cast<std::uint32_t>(shape.group),
                             static_cast<std::uint32_t>(shape.channels * shape.vectors - each * shape.group),
                             planes * each, each};
        run<T, kWidth, kRectified, true>(f, t, steps, bias, sum);
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
    if (lane == 0 && planes > 0) {
        t.partial[(static_cast<std::size_t>(part) * shape.chunks + piece) * shape.channels + channel] = total;
    }
}

// ---- the sum of what the blocks have found: partial [count, channels] -> db [channels]

template <typename T>
__global__ void __launch_bounds__(kSumThreads) sum_partials(const float* partial, int count, int channels, T* db) {
    constexpr int kTile = kSumChannels, kWarps = kSumThreads / 32;
    __shared__ float sums[kWarps][kTile];
    const int column = threadIdx.x % kTile, channel = blockIdx.x * kTile + column;
    float total = 0.0f;
    let_next_come();
    wait_for_previous();
    if (channel < channels) {
#pragma unroll 8
        for (int i = threadIdx.x / kTile; i < count; i += kSumThreads / kTile) {
            total += partial[static_cast<std::size_t>(i) * channels + channel];
        }
    }
#pragma unroll
    for (int offset = kTile; offset < 32; offset *= 2) total += __shfl_xor_sync(0xffffffffu, total, offset);
    if (threadIdx.x % 32 < kTile) sums[threadIdx.x / 32][column] = total;
    __syncthreads();
    if (threadIdx.x >= kTile || channel >= channels) return;
    total = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) total += sums[warp][column];
    db[channel] = from_float<T>(total);
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
    const int waves = p.is_rows ? 1 : kPlaneWaves;
    const std::int64_t blocks = std::int64_t{multiprocessors(kBiasAct)} * kBlocksPerProcessor * waves;
    if (p.is_rows) {
        // Several rows count as one where that makes it a whole number of vectors: RGB in channels_last.
        const std::int64_t fold = lanes / std::gcd<std::int64_t>(op.channels, lanes);
        p.is_wide = aligned && op.outer % fold == 0;
        const std::int64_t rows = p.is_wide ? op.outer / fold : op.outer;
        const std::int64_t columns = p.is_wide ? op.channels * fold / lanes : op.channels;
        const std::int64_t tiles = ceil_div(columns, 32), tile = ceil_div(columns, tiles);
        const std::int64_t step = kThreads / tile;
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
    std::int64_t group = kThreads, chunk = vectors, chunks = 1, several = 1;
    if (vectors < kThreads) {
        group = 1;
        while (group < 32 && group < vectors) group *= 2;
    }
    const std::int64_t places = kThreads / group;  // planes of a block at a time
    if (planes > blocks * places) {
        several = std::min(op.outer, ceil_div(planes, blocks * places));
    } else if (group == kThreads) {
        // As few blocks as fill their waves nearly: a piece also has a beginning and an end.
        std::int64_t best = std::numeric_limits<std::int64_t>::max();
        for (int times = 1; times <= 8; ++times) {
            const std::int64_t pieces = std::max<std::int64_t>(1, times * blocks / planes);
            const std::int64_t size = ceil_div(ceil_div(vectors, pieces), kThreads) * kThreads;
            const std::int64_t cost = ceil_div(planes * ceil_div(vectors, size), blocks) * (size + 2 * kThreads);
            if (cost < best) best = cost, chunk = size;
        }
        chunks = ceil_div(vectors, chunk);
    }
    const std::int64_t count = ceil_div(ceil_div(op.outer, several) * op.channels * chunks, places);
    p.planes = {static_cast<int>(op.outer), static_cast<int>(op.channels), static_cast<int>(vectors),
                static_cast<int>(group), static_cast<int>(chunk), static_cast<int>(chunks), static_cast<int>(several)};
    p.grid = dim3(count);
    p.partials = ceil_div(op.outer, several) * chunks;
    return p;
}

template <typename T, int kWidth, bool kRectified>
void launch(const BiasAct& op, const Plan& p, const Tensors<T>& t, cudaStream_t stream) {
    constexpr int shared = Feed<T, kWidth>::kBytes;
    const auto run = [&](auto kernel, const auto& shape) {
        allow_shared_memory(kernel, shared, kBiasAct);
        launch_early(kBiasAct, kernel, p.grid, kThreads, shared, stream, Formula(op), shape, t);
    };
    if (p.is_rows) run(gradients_rows<T, kWidth, kRectified>, p.rows);
    else run(gradients_planes<T, kWidth, kRectified>, p.planes);
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
        launch_early(kBiasAct, sum_partials<T>, ceil_div(op.channels, kSumChannels), kSumThreads, 0, stream, partial,
                     static_cast<int>(p.partials), static_cast<int>(op.channels), static_cast<T*>(db));
    });
}

}  // namespace clone_fast

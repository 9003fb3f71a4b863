// The styles of a generator: 19 MB of weights for StyleGAN2's config F, each of which is read once, for the few numbers
// of one latent. Nothing else of a step can run before they are there, so what counts is that all bytes are asked for
// at once: in one launch, as many loads as registers hold on their way in every thread.
#include "styles.h"

#include <algorithm>

#include "launch.cuh"

namespace clone_fast {
namespace {

constexpr const char* kOp = "styles";

// ---- the layers, found by the number of a block ---------------------------------------------------------------------

// What a kernel is told: a layer's blocks are first[l] to first[l + 1].
template <typename Layer>
struct Table {
    const float* ws;
    std::int64_t sample_stride, latent_stride;
    int n, latents, width, count;
    float gain;
    int first[kStyleLayers + 1];
    Layer layers[kStyleLayers];

    __device__ __forceinline__ int layer_of(int block) const {
        int found = 0;
#pragma unroll
        for (int step = 32; step > 0; step /= 2)  // first has fewer than 64
            if (found + step < count && first[found + step] <= block) found += step;
        return found;
    }
};

// A table whose layers are still to be filled in, with a block for every `chunk` rows.
template <typename Layer>
Table<Layer> table_of(const Styles& op, int chunk) {
    const std::size_t count = op.rows.size();
    if (count < 1 || count > kStyleLayers || op.reads.size() != count || op.factors.size() != count)
        fail(kOp, "takes 1 to " + std::to_string(kStyleLayers) + " layers");
    if (op.n < 1 || op.width < 4 || op.width % 4 || op.sample_stride % 4 || op.latent_stride % 4 || !is_aligned(op.ws))
        fail(kOp, "wants latents on 16 bytes, of a multiple of 4 numbers");
    Table<Layer> table = {op.ws, op.sample_stride, op.latent_stride, op.n, op.latents, op.width,
                          static_cast<int>(count), op.gain, {}, {}};
    for (std::size_t l = 0; l < count; ++l) {
        if (op.rows[l] < 1 || op.reads[l] < 0 || op.reads[l] >= op.latents) fail(kOp, "a layer reads no latent");
        table.first[l + 1] = table.first[l] + ceil_div(op.rows[l], chunk);
    }
    return table;
}

template <typename... Lists>
void check_counts(std::size_t count, const Lists&... lists) {
    if (((lists.size() != count) || ...)) fail(kOp, "wants a pointer for every layer");
}

__device__ __forceinline__ float4 load(const float* from) { return *reinterpret_cast<const float4*>(from); }
__device__ __forceinline__ void store(float* to, float4 x) { *reinterpret_cast<float4*>(to) = x; }
__device__ __forceinline__ float4 scaled(float4 x, float by) {
    return make_float4(x.x * by, x.y * by, x.z * by, x.w * by);
}
__device__ __forceinline__ void add(float4& sum, float4 x, float by = 1.0f) {
    sum.x = fmaf(x.x, by, sum.x);
    sum.y = fmaf(x.y, by, sum.y);
    sum.z = fmaf(x.z, by, sum.z);
    sum.w = fmaf(x.w, by, sum.w);
}

// ---- forward: a warp for every four rows ----------------------------------------------------------------------------

constexpr int kWarps = 4;
constexpr int kRows = 4;                // of a warp
constexpr int kVectors = 4;             // of a row that a thread holds
constexpr int kHeld = kVectors * 128;   // columns that a warp holds

struct Affine {
    const float* weight;
    const float* bias;
    float* styles;
    int rows, read;
    float factor;
};

__global__ void __launch_bounds__(32 * kWarps, 5) forward(const __grid_constant__ Table<Affine> t) {
    const int block = blockIdx.x, found = t.layer_of(block);
    const Affine& layer = t.layers[found];
    const int row = ((block - t.first[found]) * kWarps + threadIdx.x / 32) * kRows;
    const int lane = threadIdx.x % 32, rows = layer.rows, width = t.width;
    let_next_come();
    wait_for_previous();
    if (row >= rows) return;

    float4 held[kRows][kVectors];
    const auto hold = [&](int begin) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const float* from = layer.weight + static_cast<std::int64_t>(min(row + r, rows - 1)) * width;
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
                const int column = begin + v * 128 + lane * 4;
                held[r][v] = column < width ? load(from + column) : float4{};
            }
        }
    };
    hold(0);
    const int mine = row + lane;  // the first lanes finish a row each
    const float bias = lane < kRows && mine < rows ? layer.bias[mine] : 0.0f;
    for (int n = 0; n < t.n; ++n) {
        const float* w = t.ws + n * t.sample_stride + layer.read * t.latent_stride;
        float sums[kRows] = {};
        for (int begin = 0; begin < width; begin += kHeld) {
            if (width > kHeld && n + begin > 0) hold(begin);
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
                const int column = begin + v * 128 + lane * 4;
                const float4 x = column < width ? load(w + column) : float4{};
#pragma unroll
                for (int r = 0; r < kRows; ++r) {
                    const float4 y = held[r][v];
                    sums[r] = fmaf(x.x, y.x, fmaf(x.y, y.y, fmaf(x.z, y.z, fmaf(x.w, y.w, sums[r]))));
                }
            }
        }
        float sum = 0.0f;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const float all = warp_sum(sums[r]);
            if (lane == r) sum = all;
        }
        if (lane < kRows && mine < rows)
            layer.styles[static_cast<std::int64_t>(n) * rows + mine] = layer.factor * fmaf(t.gain, sum, bias);
    }
}

// ---- backward: a block for every 32 rows, a thread for 4 columns of half of them ------------------------------------

constexpr int kChunk = 32;
constexpr int kHalf = kChunk / 2;
constexpr int kColumns = 128;  // in vectors of 4

// All 284 blocks of config F at once are three on a processor of an H200.
constexpr int blocks_per_processor(int samples, bool layers, bool ws) { return layers && ws && samples > 4 ? 2 : 3; }

struct Slopes {
    const float* weight;
    const float* gradient;
    float* dweight;
    float* dbias;
    std::int64_t stride;
    int rows, read;
    float factor;
};

// kN samples at a time. partial [blocks, N, width]: of dws what the rows of a block give, without the gain.
template <int kN, bool kLayers, bool kWs>
__global__ void __launch_bounds__(2 * kColumns, blocks_per_processor(kN, kLayers, kWs))
    backward(const __grid_constant__ Table<Slopes> t, float* partial) {
    constexpr int kAhead = kN > 4 || (kLayers && kN > 2) ? 4 : 8;  // rows whose weights are on their way
    __shared__ float slopes[kN][kChunk];
    __shared__ float4 other[kWs ? kN : 1][kColumns];  // the sums of the other half
    const int block = blockIdx.x, found = t.layer_of(block);
    const Slopes& layer = t.layers[found];
    const int begin = (block - t.first[found]) * kChunk, rows = min(layer.rows - begin, kChunk), width = t.width;
    const int thread = threadIdx.x, x = thread % kColumns, half = thread / kColumns * kHalf;
    const int column = (blockIdx.y * kColumns + x) * 4;
    const bool inside = column < width;
    const std::int64_t place = static_cast<std::int64_t>(begin) * width + column;
    let_next_come();
    wait_for_previous();

    for (int n = 0; n < t.n; n += kN) {
        float4 ahead[kAhead];
        const auto hold = [&](int from) {
#pragma unroll
            for (int r = 0; r < kAhead; ++r)
                ahead[r] = inside && from + r < rows ? load(layer.weight + place + (from + r) * width) : float4{};
        };
        if constexpr (kWs) hold(half);
        __syncthreads();  // of the samples before, all is read
        for (int i = thread; i < kN * kChunk; i += 2 * kColumns) {
            const int sample = n + i / kChunk, row = i % kChunk;
            const bool real = sample < t.n && row < rows;
            slopes[i / kChunk][row] = real ? layer.factor * layer.gradient[sample * layer.stride + begin + row] : 0.0f;
        }
        float4 latent[kLayers ? kN : 1], sums[kWs ? kN : 1] = {};
        if constexpr (kLayers) {
#pragma unroll
            for (int i = 0; i < kN; ++i) {
                const float* w = t.ws + (n + i) * t.sample_stride + layer.read * t.latent_stride + column;
                latent[i] = inside && n + i < t.n ? scaled(load(w), t.gain) : float4{};
            }
        }
        __syncthreads();
        if (kLayers && blockIdx.y == 0 && thread < rows) {
            float sum = n > 0 ? layer.dbias[begin + thread] : 0.0f;
#pragma unroll
            for (int i = 0; i < kN; ++i) sum += slopes[i][thread];
            layer.dbias[begin + thread] = sum;
        }
#pragma unroll 1
        for (int from = half; from < half + kHalf; from += kAhead) {
            if (kWs && from > half) hold(from);
#pragma unroll
            for (int r = 0; r < kAhead; ++r) {
                const int row = from + r;
                if constexpr (kWs) {
#pragma unroll
                    for (int i = 0; i < kN; ++i) add(sums[i], ahead[r], slopes[i][row]);
                }
                if (kLayers && inside && row < rows) {
                    float* to = layer.dweight + place + row * width;
                    float4 sum = n > 0 ? load(to) : float4{};
#pragma unroll
                    for (int i = 0; i < kN; ++i) add(sum, latent[i], slopes[i][row]);
                    store(to, sum);
                }
            }
        }
        if constexpr (kWs) {
            if (half > 0) {
#pragma unroll
                for (int i = 0; i < kN; ++i) other[i][x] = sums[i];
            }
            __syncthreads();
            if (half == 0 && inside) {
#pragma unroll
                for (int i = 0; i < kN; ++i) {
                    if (n + i >= t.n) break;
                    add(sums[i], other[i][x]);
                    store(partial + (static_cast<std::int64_t>(block) * t.n + n + i) * width + column, sums[i]);
                }
            }
        }
    }
}

// ---- backward: the partial sums of dws ------------------------------------------------------------------------------

constexpr int kGroups = 16;  // of a block's threads, each of which sums some of the partial ones

// Blocks of `backward` whose layers lie side by side and read the same latent.
struct Run {
    int read, begin, end;
};

struct Runs {
    int count;
    Run runs[kStyleLayers];
};

// A block for 128 columns of a latent of a sample.
__global__ void __launch_bounds__(32 * kGroups) sum_partials(const __grid_constant__ Runs all, const float* partial,
                                                             float* dws, int width, float gain) {
    __shared__ float4 sums[kGroups][32];
    const int lane = threadIdx.x % 32, group = threadIdx.x / 32;
    const int column = (blockIdx.x * 32 + lane) * 4, latent = blockIdx.y, latents = gridDim.y;
    const std::int64_t n = blockIdx.z, step = static_cast<std::int64_t>(gridDim.z) * width;
    let_next_come();
    wait_for_previous();
    float4 sum = {};
    if (column < width) {
        for (int i = 0; i < all.count; ++i) {
            const Run run = all.runs[i];
            if (run.read != latent) continue;
#pragma unroll 8
            for (int block = run.begin + group; block < run.end; block += kGroups)
                add(sum, load(partial + block * step + n * width + column));
        }
    }
    sums[group][lane] = sum;
    __syncthreads();
    if (group > 0 || column >= width) return;
#pragma unroll
    for (int i = 1; i < kGroups; ++i) add(sum, sums[i][lane]);
    store(dws + (n * latents + latent) * width + column, scaled(sum, gain));
}

Runs runs_of(const Table<Slopes>& table) {
    Runs all = {};
    for (int l = 0; l < table.count; ++l) {
        const int read = table.layers[l].read, end = table.first[l + 1];
        if (all.count && all.runs[all.count - 1].read == read) all.runs[all.count - 1].end = end;
        else all.runs[all.count++] = {read, table.first[l], end};
    }
    return all;
}

// As many samples at a time as there are, up to 8.
template <typename Function>
void with_samples(int n, Function&& function) {
    if (n == 1) function(std::integral_constant<int, 1>{});
    else if (n == 2) function(std::integral_constant<int, 2>{});
    else if (n <= 4) function(std::integral_constant<int, 4>{});
    else function(std::integral_constant<int, 8>{});
}

}  // namespace

void styles(const Styles& op, const std::vector<const float*>& weights, const std::vector<const float*>& biases,
            const std::vector<float*>& styles, cudaStream_t stream) {
    Table<Affine> table = table_of<Affine>(op, kWarps * kRows);
    check_counts(op.rows.size(), weights, biases, styles);
    for (int l = 0; l < table.count; ++l) {
        if (!is_aligned(weights[l])) fail(kOp, "wants weights on 16 bytes");
        table.layers[l] = {weights[l], biases[l], styles[l], op.rows[l], op.reads[l], op.factors[l]};
    }
    launch_early(kOp, forward, table.first[table.count], 32 * kWarps, 0, stream, table);
}

std::int64_t styles_partials(const Styles& op) {
    std::int64_t blocks = 0;
    for (const int rows : op.rows) blocks += ceil_div(rows, kChunk);
    return blocks * op.n * op.width;
}

void styles_backward(const Styles& op, const std::vector<const float*>& weights,
                     const std::vector<const float*>& gradients, const std::vector<std::int64_t>& strides,
                     const std::vector<float*>& dweights, const std::vector<float*>& dbiases, float* dws,
                     float* partial, cudaStream_t stream) {
    Table<Slopes> table = table_of<Slopes>(op, kChunk);
    const bool layers = !dweights.empty();
    if (!layers && dws == nullptr) fail(kOp, "wants a place for its gradients");
    check_counts(op.rows.size(), weights, gradients, strides);
    if (layers) check_counts(op.rows.size(), dweights, dbiases);
    for (int l = 0; l < table.count; ++l) {
        if (!is_aligned(weights[l]) || (layers && !is_aligned(dweights[l]))) fail(kOp, "wants weights on 16 bytes");
        table.layers[l] = {weights[l],  gradients[l], layers ? dweights[l] : nullptr, layers ? dbiases[l] : nullptr,
                           strides[l],  op.rows[l],   op.reads[l],                    op.factors[l]};
    }
    const dim3 blocks(table.first[table.count], ceil_div(op.width, 4 * kColumns));
    with_samples(op.n, [&](auto samples) {
        constexpr int kN = decltype(samples)::value;
        const auto run = [&](auto kernel) {
            launch_early(kOp, kernel, blocks, 2 * kColumns, 0, stream, table, partial);
        };
        if (dws == nullptr) run(backward<kN, true, false>);
        else if (layers) run(backward<kN, true, true>);
        else run(backward<kN, false, true>);
    });
    if (dws == nullptr) return;
    const dim3 sums(ceil_div(op.width, 128), op.latents, op.n);
    launch_early(kOp, sum_partials, sums, 32 * kGroups, 0, stream, runs_of(table), partial, dws, op.width, op.gain);
}

}  // namespace clone_fast

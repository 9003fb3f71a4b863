// A step of Adam moves 28 bytes for each number and computes next to nothing: what counts is that enough blocks ask for
// them. A weight of 2 million numbers keeps the whole GPU's memory busy by itself here, so that its step, taken beside
// the backward of small layers, is over before the next one comes.
//
// And that no more of them ask than that takes: what is asked for beyond it waits in line, and with it whatever the
// small layers ask for, several times in a row each. So a few blocks on each multiprocessor take piece after piece.
#include "adam.h"

#include <algorithm>
#include <cmath>

#include "launch.cuh"

namespace clone_fast {
namespace {

constexpr const char* kOp = "adam";
constexpr int kTensors = 64;  // of a launch: their table is an argument of the kernel, and goes into a graph with it
constexpr int kThreads = 256;
constexpr int kVectors = 2;  // of four numbers, for each thread: all loads of a block are under way at once
constexpr int kChunk = kThreads * kVectors * 4;
constexpr int kBlocks = 3;  // on a multiprocessor

struct Table {
    AdamTensor tensors[kTensors];
    int first[kTensors + 1];  // piece of each tensor
    int count;
    std::uint64_t aligned;  // a bit for each tensor: whether all of it lies on 16 bytes
    const float* rate;
    float beta1, beta2, log_beta1, log_beta2, epsilon;

    __device__ __forceinline__ int tensor_of(int piece) const {
        int found = 0;
#pragma unroll
        for (int step = kTensors / 2; step > 0; step /= 2)
            if (found + step < count && first[found + step] <= piece) found += step;
        return found;
    }
};

// What a step does to one number.
struct Rule {
    float beta1, beta2, size, root, epsilon;

    __device__ __forceinline__ void operator()(float& p, float g, float& m, float& v) const {
        m = fmaf(beta1, m, (1.0f - beta1) * g);
        v = fmaf(beta2, v, (1.0f - beta2) * g * g);
        p -= size * m / (sqrtf(v) * root + epsilon);
    }
    __device__ __forceinline__ void operator()(float4& p, const float4& g, float4& m, float4& v) const {
        (*this)(p.x, g.x, m.x, v.x);
        (*this)(p.y, g.y, m.y, v.y);
        (*this)(p.z, g.z, m.z, v.z);
        (*this)(p.w, g.w, m.w, v.w);
    }
};

__device__ __forceinline__ float4 load(const float* from) { return *reinterpret_cast<const float4*>(from); }
__device__ __forceinline__ void store(float* to, float4 x) { *reinterpret_cast<float4*>(to) = x; }

__device__ __forceinline__ void take_step(const Table& t, int piece) {
    const int found = t.tensor_of(piece);
    const AdamTensor& own = t.tensors[found];
    const std::int64_t begin = static_cast<std::int64_t>(piece - t.first[found]) * kChunk;
    // 1 - beta^steps, without what is lost where beta^steps is close to 1
    const float steps = *own.steps + 1.0f;
    const float correction1 = -expm1f(steps * t.log_beta1), correction2 = -expm1f(steps * t.log_beta2);
    const Rule rule = {t.beta1, t.beta2, *t.rate / correction1, rsqrtf(correction2), t.epsilon};
    if ((t.aligned >> found & 1) && begin + kChunk <= own.count) {
        float4 p[kVectors], g[kVectors], m[kVectors], v[kVectors];
#pragma unroll
        for (int k = 0; k < kVectors; ++k) {
            const std::int64_t at = begin + (k * kThreads + threadIdx.x) * 4;
            p[k] = load(own.parameter + at);
            g[k] = load(own.gradient + at);
            m[k] = load(own.mean + at);
            v[k] = load(own.square + at);
        }
#pragma unroll
        for (int k = 0; k < kVectors; ++k) {
            const std::int64_t at = begin + (k * kThreads + threadIdx.x) * 4;
            rule(p[k], g[k], m[k], v[k]);
            store(own.parameter + at, p[k]);
            store(own.mean + at, m[k]);
            store(own.square + at, v[k]);
        }
        return;
    }
    const std::int64_t end = min(begin + kChunk, own.count);
    for (std::int64_t at = begin + threadIdx.x; at < end; at += kThreads) {
        float p = own.parameter[at], m = own.mean[at], v = own.square[at];
        rule(p, own.gradient[at], m, v);
        own.parameter[at] = p;
        own.mean[at] = m;
        own.square[at] = v;
    }
}

__global__ void __launch_bounds__(kThreads) adam_step(const __grid_constant__ Table t) {
    let_next_come();
    wait_for_previous();
    for (int piece = blockIdx.x; piece < t.first[t.count]; piece += gridDim.x) take_step(t, piece);
}

}  // namespace

void adam(const std::vector<AdamTensor>& tensors, const float* rate, double beta1, double beta2, double epsilon,
          cudaStream_t stream) {
    if (!(beta1 >= 0 && beta1 < 1 && beta2 >= 0 && beta2 < 1 && epsilon > 0))
        fail(kOp, "wants betas in [0, 1) and an epsilon above 0");
    for (std::size_t begin = 0; begin < tensors.size(); begin += kTensors) {
        Table table = {};
        table.count = static_cast<int>(std::min<std::size_t>(kTensors, tensors.size() - begin));
        for (int i = 0; i < table.count; ++i) {
            const AdamTensor& one = table.tensors[i] = tensors[begin + i];
            const std::int64_t pieces = ceil_div(one.count, std::int64_t{kChunk});
            if (one.count < 1 || pieces > 1 << 24) fail(kOp, "takes tensors of 1 to 2^34 elements");
            table.first[i + 1] = table.first[i] + static_cast<int>(pieces);
            const bool aligned = is_aligned(one.parameter) && is_aligned(one.gradient) && is_aligned(one.mean) &&
                                 is_aligned(one.square);
            table.aligned |= static_cast<std::uint64_t>(aligned) << i;
        }
        table.rate = rate;
        table.beta1 = static_cast<float>(beta1);
        table.beta2 = static_cast<float>(beta2);
        table.log_beta1 = static_cast<float>(std::log(beta1));  // -inf for 0, whose correction is 1
        table.log_beta2 = static_cast<float>(std::log(beta2));
        table.epsilon = static_cast<float>(epsilon);
        const int blocks = std::min(table.first[table.count], kBlocks * multiprocessors(kOp));
        launch_early(kOp, adam_step, dim3(blocks), kThreads, 0, stream, table);
    }
}

}  // namespace clone_fast

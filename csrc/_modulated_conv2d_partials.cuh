// The partial sums of the weight gradient, and the kernel that adds them, in a fixed order.
#pragma once

#include "launch.cuh"
#include "modulated_conv2d.h"

namespace clone_fast::conv3x3 {

// What the four numbers `i` of a partial sum are: a pair at each of two places of y, -1 where there is no such place.
struct Places {
    int first, second;
};

// As in y: [3, 3, B, A].
struct PlainOrder {
    static int vectors(const Conv3x3Wgrad& op) { return 9 * op.channels_b * op.channels_a / 4; }
    static __device__ __forceinline__ Places places(const Conv3x3Wgrad&, int i) { return {4 * i, 4 * i + 2}; }
};

// As the threads of the kernel on wgmma hold them, 2 kChannels for each column tap: [8 columns][tap][thread], so that
// a warp stores 512 bytes at once. A column is a channel of a for a row tap; a thread has two of every 8, for two
// channels of b.
template <int kChannels>
struct HeldOrder {
    static constexpr int kVectors = 9 * kChannels * kChannels / 4, kThreadsOfTap = 2 * kChannels;

    static int vectors(const Conv3x3Wgrad&) { return kVectors; }
    static __device__ __forceinline__ int vector(int columns, int dx, int thread) {
        return (columns * 3 + dx) * kThreadsOfTap + thread;
    }
    static __device__ __forceinline__ Places places(const Conv3x3Wgrad& op, int i) {
        const int thread = i % kThreadsOfTap, dx = i / kThreadsOfTap % 3, columns = i / (3 * kThreadsOfTap);
        const int column = columns * 8 + thread % 4 * 2, dy = column / kChannels, ca = column % kChannels;
        const int cb = thread / 32 * 16 + thread % 32 / 4;
        const auto place = [&](int row) {
            if (ca >= op.channels_a || row >= op.channels_b) return -1;
            return ((dy * 3 + dx) * op.channels_b + row) * op.channels_a + ca;
        };
        return {place(cb), place(cb + 8)};
    }
};

// It is short and all waiting: sixteen threads share the partial sums of a place, so that with as many as there are
// multiprocessors each thread has nearly all of its loads on their way at once.
constexpr int kAddThreads = 256, kAddShare = 16, kAddPlaces = kAddThreads / kAddShare, kAddBatch = 9;

template <typename Order>
__global__ void __launch_bounds__(kAddThreads) add_partials_kernel(const Conv3x3Wgrad op, int vectors) {
    __shared__ float4 shared[kAddShare][kAddPlaces];
    const int place = threadIdx.x % kAddPlaces, share = threadIdx.x / kAddPlaces, i = blockIdx.x * kAddPlaces + place;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    const auto add = [&](float4 other) {
        sum = make_float4(sum.x + other.x, sum.y + other.y, sum.z + other.z, sum.w + other.w);
    };
    const float4* from = reinterpret_cast<const float4*>(op.partial) +
                         static_cast<std::int64_t>(blockIdx.y) * op.partials * vectors + min(i, vectors - 1);
    for (int p = share; p < op.partials; p += kAddShare * kAddBatch) {
        float4 batch[kAddBatch];
#pragma unroll
        for (int j = 0; j < kAddBatch; ++j) {  // beyond the end it reads the last: a load without a condition overlaps
            const int here = min(p + j * kAddShare, op.partials - 1);
            batch[j] = from[static_cast<std::int64_t>(here) * vectors];
        }
#pragma unroll
        for (int j = 0; j < kAddBatch; ++j) {
            if (p + j * kAddShare < op.partials) add(batch[j]);
        }
    }
    shared[share][place] = sum;
    __syncthreads();
    if (share > 0 || i >= vectors) return;
#pragma unroll
    for (int other = 1; other < kAddShare; ++other) add(shared[other][place]);
    float* y = op.y + static_cast<std::int64_t>(blockIdx.y) * 9 * op.channels_b * op.channels_a;
    const Places places = Order::places(op, i);
    if (places.first >= 0) *reinterpret_cast<float2*>(y + places.first) = make_float2(sum.x, sum.y);
    if (places.second >= 0) *reinterpret_cast<float2*>(y + places.second) = make_float2(sum.z, sum.w);
}

template <typename Order>
void add_partials(const Conv3x3Wgrad& op, cudaStream_t stream) {
    const int vectors = Order::vectors(op);
    add_partials_kernel<Order>
        <<<dim3(ceil_div(vectors, kAddPlaces), op.results), kAddThreads, 0, stream>>>(op, vectors);
    check_launch("modulated_conv2d");
}

}  // namespace clone_fast::conv3x3

// The kernel of laplacian_pyramid for all levels below a certain size, down and up again in one launch: a cluster of
// blocks does a plane's. Each block keeps some rows of every level in its shared memory and reads the few above and
// below from that of its neighbours. Before Hopper, and for a few rows, the cluster is one block.
#pragma once

#include "laplacian_pyramid_strip.cuh"

namespace clone_fast::pyramid {

// Rows and columns of the first level, at most: of a cluster, and where a plane is one block's.
inline constexpr int kTailSize = 128, kTailAlone = 64;
inline constexpr int kTailLevels = 8;   // 128, 64, ..., 1
inline constexpr int kTailCluster = 8;  // blocks at most: as many as every GPU that knows clusters allows
inline constexpr int kTailRows = 2;     // of a thread
inline constexpr int kTailThreads = 384;

struct Tail {
    float* level;  // the first level, [planes, H, W]; with `keep`, d loss / d level is written in its place
    bool keep;
    float eps_squared;
    int blocks;  // of a plane
    int count;   // of levels
    int height[kTailLevels], width[kTailLevels];
    int shift[kTailLevels];     // a block has 1 << shift rows of the level
    int pitch[kTailLevels];     // of rows, in floats of shared memory; a multiple of 4
    int offset[kTailLevels];    // of the block's rows, likewise
    int slopes;                 // where the slopes are, that lie as the levels do, in floats from these
    double scale[kTailLevels];  // weight / number of elements
    double* partial;            // one sum for each block
};

// ---- shared memory of a cluster ------------------------------------------------------------------------------------

// What all blocks of the cluster have written is there for all of them.
__device__ __forceinline__ void cluster_barrier([[maybe_unused]] int blocks) {
#if __CUDA_ARCH__ >= 900
    if (blocks > 1) {
        asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
        return;
    }
#endif
    __syncthreads();
}

// `at` is an address in the shared memory of this block, `self`, and stands for the same one of block `rank`. Without
// branches, so that all loads of a thread are on their way at once.
#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ float4 load_row(const float* at, int rank, int self) {
    float4 v;
    asm volatile("{\n.reg .pred here;\n.reg .b32 there;\nsetp.eq.s32 here, %5, %6;\n"
                 "mapa.shared::cluster.u32 there, %4, %5;\n"
                 "@here ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];\n"
                 "@!here ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n}"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(shared_address(at)), "r"(rank), "r"(self));
    return v;
}
__device__ __forceinline__ float2 load_pair(const float* at, int rank, int self) {
    float2 v;
    asm volatile("{\n.reg .pred here;\n.reg .b32 there;\nsetp.eq.s32 here, %3, %4;\n"
                 "mapa.shared::cluster.u32 there, %2, %3;\n"
                 "@here ld.shared.v2.f32 {%0, %1}, [%2];\n"
                 "@!here ld.shared::cluster.v2.f32 {%0, %1}, [there];\n}"
                 : "=f"(v.x), "=f"(v.y)
                 : "r"(shared_address(at)), "r"(rank), "r"(self));
    return v;
}
__device__ __forceinline__ void store_pair(float* at, int rank, int self, float2 v) {
    asm volatile("{\n.reg .pred here;\n.reg .b32 there;\nsetp.eq.s32 here, %1, %2;\n"
                 "mapa.shared::cluster.u32 there, %0, %1;\n"
                 "@here st.shared.v2.f32 [%0], {%3, %4};\n"
                 "@!here st.shared::cluster.v2.f32 [there], {%3, %4};\n}" ::"r"(shared_address(at)),
                 "r"(rank), "r"(self), "f"(v.x), "f"(v.y)
                 : "memory");
}
#else  // one block
__device__ __forceinline__ float4 load_row(const float* at, int, int) { return *reinterpret_cast<const float4*>(at); }
__device__ __forceinline__ float2 load_pair(const float* at, int, int) { return *reinterpret_cast<const float2*>(at); }
__device__ __forceinline__ void store_pair(float* at, int, int, float2 v) { *reinterpret_cast<float2*>(at) = v; }
#endif

// ---- a level -------------------------------------------------------------------------------------------------------

// A level in the shared memory of the cluster.
struct TailLevel {
    float* level;  // this block's rows
    int height, width, pitch, shift, self;

    __device__ __forceinline__ TailLevel(const Tail& a, int j, float* shared, int self)
        : level(shared + a.offset[j]),
          height(a.height[j]),
          width(a.width[j]),
          pitch(a.pitch[j]),
          shift(a.shift[j]),
          self(self) {}
    __device__ __forceinline__ int first_row() const { return self << shift; }
    __device__ __forceinline__ int rank(int y) const { return y >> shift; }
    __device__ __forceinline__ float* at(int y, int x) const { return level + (y & ((1 << shift) - 1)) * pitch + x; }
};

// walk(x, y, own) for this warp's groups of kTailRows rows of the block's part of a level: from column x and row y on;
// `own` where the columns are to be written. The whole warp is always there.
template <typename Walk>
__device__ __forceinline__ void tail_walk(const TailLevel& at, Walk&& walk) {
    const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const bool overlaps = at.width > kStrip;
    const int strips = overlaps ? ceil_div(at.width, kStep) : 1;
    // Lanes of a row are a power of two: a warp holds 32 / lanes groups of rows.
    const int lanes = overlaps ? 5 : at.width <= 4 ? 0 : 32 - __clz((at.width - 1) / 4);
    const int rows = min(1 << at.shift, at.height - at.first_row());
#pragma unroll 1
    for (int w = warp_of_block();; w += warps) {
        const int group = w / strips;
        if (group * (32 >> lanes) * kTailRows >= rows) break;
        const int x = (overlaps ? (w - group * strips) * kStep - 4 : 0) + (lane & ((1 << lanes) - 1)) * 4;
        const int row = (group * (32 >> lanes) + (lane >> lanes)) * kTailRows;
        walk(x, at.first_row() + row,
             row < rows && x < at.width && (!overlaps || (lane > 0 && lane < 31)));
    }
}

// Rows y0-4 .. of a thread in registers. Outside the image the last samples are repeated (kAdjoint: there are zeros).
template <bool kAdjoint>
struct TailRows {
    float rows[kTailRows + 7][4];

    __device__ __forceinline__ TailRows(const TailLevel& at, int x, int y0) {
        const int column = min(max(x, 0), at.pitch - 4);
#pragma unroll
        for (int r = 0; r < kTailRows + 7; ++r) {
            const int there = clamped(y0 - 4 + r, at.height);
            Four<float>::unpack(load_row(at.at(there, column), at.rank(there), at.self), rows[r]);
        }
#pragma unroll
        for (int r = 0; r < kTailRows + 7; ++r) {
            const int y = y0 - 4 + r;
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const bool inside = x + k < at.width;
                if (!kAdjoint) rows[r][k] = inside || k == 0 ? rows[r][k] : rows[r][k == 0 ? 0 : k - 1];
                else rows[r][k] = inside && y >= 0 && y < at.height ? rows[r][k] : 0.0f;
            }
        }
    }
    __device__ __forceinline__ void operator()(int r, float (&v)[4]) const {
#pragma unroll
        for (int k = 0; k < 4; ++k) v[k] = rows[r][k];
    }
};

// A level's slopes and the level below are written. Returns this thread's sum of rho.
template <bool kAbsolute>
__device__ __forceinline__ float tail_down(const Tail& a, int j, float* shared, int self) {
    const TailLevel at(a, j, shared, self), below(a, j + 1, shared, self);
    const Rho<kAbsolute> rho{a.eps_squared};
    float sum = 0;
    tail_walk(at, [&](int x, int y0, bool own) {
        strip_down<kTailRows>(
            Columns<false>(x, at.width), y0, at.height, TailRows<false>(at, x, y0),
            [&](int t, const float (&v)[2]) {
                const int i = y0 / 2 + t;
                if (own && i < below.height) {
                    store_pair(below.at(i, x / 2), below.rank(i), self, make_float2(v[0], v[1]));
                }
            },
            [&](int r, const float (&band)[4]) {
                if (!own || y0 + r >= at.height) return;
#pragma unroll
                for (int k = 0; k < 4; ++k) sum += x + k < at.width ? rho(band[k]) : 0.0f;
                if (!a.keep) return;
                *reinterpret_cast<float4*>(at.at(y0 + r, x) + a.slopes) =
                    make_float4(rho.slope(band[0]), rho.slope(band[1]), rho.slope(band[2]), rho.slope(band[3]));
            });
    });
    return sum;
}

// d loss / d level in place of the level, from its slopes and from d loss / d the level below.
__device__ __forceinline__ void tail_up(const Tail& a, int j, float* shared, int self) {
    const TailLevel at(a, j, shared, self), slopes(a, j, shared + a.slopes, self), below(a, j + 1, shared, self);
    tail_walk(at, [&](int x, int y0, bool own) {
        strip_up<kTailRows>(
            Columns<true>(x, at.width), y0, at.height, static_cast<float>(a.scale[j]), 1.0f,
            TailRows<true>(slopes, x, y0),
            [&](int t, float (&v)[2]) {
                const int i = y0 / 2 - 1 + t, k = x / 2;
                v[0] = v[1] = 0;
                if (i < 0 || i >= below.height || x < 0 || k >= below.width) return;
                const float2 pair = load_pair(below.at(i, k), below.rank(i), self);
                v[0] = pair.x;
                if (k + 1 < below.width) v[1] = pair.y;
            },
            [&](int r, const float (&v)[4]) {
                if (own && y0 + r < at.height) {
                    *reinterpret_cast<float4*>(at.at(y0 + r, x)) = make_float4(v[0], v[1], v[2], v[3]);
                }
            });
    });
}

template <bool kAbsolute>
__global__ void __launch_bounds__(kTailThreads) tail_levels(const __grid_constant__ Tail a) {
    extern __shared__ __align__(16) float shared[];
    __shared__ double sums[32];
    const int plane = static_cast<int>(blockIdx.x) / a.blocks, self = static_cast<int>(blockIdx.x) - plane * a.blocks;
    const int last = a.count - 1;
    const Rho<kAbsolute> rho{a.eps_squared};
    float* level = a.level + static_cast<std::int64_t>(plane) * a.height[0] * a.width[0];
    const auto each = [&](int j, auto&& use) {  // use(in shared memory, in memory), of this block's rows
        const TailLevel at(a, j, shared, self);
        const int rows = min(1 << at.shift, at.height - at.first_row());
        for (int y = threadIdx.x / 32; y < rows; y += blockDim.x / 32) {
            for (int x = threadIdx.x % 32; x < at.width; x += 32) {
                use(at.level[y * at.pitch + x], (at.first_row() + y) * at.width + x);
            }
        }
    };
    const TailLevel top(a, 0, shared, self);
    const bool vectors = top.width % 4 == 0;
    // copy(in shared memory, in memory) for four columns at once
    const auto fours = [&](auto&& copy) {
        const int across = top.width / 4, rows = min(1 << top.shift, top.height - top.first_row());
#pragma unroll 2
        for (int i = threadIdx.x; i < rows * across; i += blockDim.x) {
            const int y = i / across, x = (i - y * across) * 4;
            copy(*reinterpret_cast<float4*>(top.level + y * top.pitch + x),
                 *reinterpret_cast<float4*>(level + (top.first_row() + y) * top.width + x));
        }
    };
    wait_for_previous();
    if (vectors) fours([&](float4& v, const float4& from) { v = from; });
    else each(0, [&](float& v, int i) { v = level[i]; });
    double total = 0;
#pragma unroll 1
    for (int j = 0; j < last; ++j) {
        cluster_barrier(a.blocks);
        total += a.scale[j] * static_cast<double>(tail_down<kAbsolute>(a, j, shared, self));
    }
    cluster_barrier(a.blocks);
    float sum = 0;
    each(last, [&](float& v, int) {
        sum += rho(v);
        v = static_cast<float>(a.scale[last]) * rho.slope(v);
    });
    total += a.scale[last] * static_cast<double>(sum);
    if (a.keep) {
#pragma unroll 1
        for (int j = last - 1; j >= 0; --j) {
            cluster_barrier(a.blocks);
            tail_up(a, j, shared, self);
        }
        __syncthreads();
        if (vectors) fours([&](const float4& v, float4& to) { to = v; });
        else each(0, [&](const float& v, int i) { level[i] = v; });
    }
    let_next_come();
    total = block_sum(total, sums);
    if (threadIdx.x == 0) a.partial[blockIdx.x] = total;
    cluster_barrier(a.blocks);  // nobody leaves while others may read its shared memory
}

}  // namespace clone_fast::pyramid

// The 3x3 convolution of stride 2 and its adjoint, the transposed one (compute capability 9.0), on wgmma.
//
// A block keeps the weights of kOut channels of the result in shared memory, all taps and input channels. Two groups of
// four warps take tile after tile, each on its own: while one stores, the other multiplies. For each a warp brings the
// input in boxes with one row and one column more than the tile, which serve all taps: the tensor cores read a shifted
// tile from a shifted address. That works since the units of a box are permuted by their address, not by their row.
//
// Channels of the result are permuted in shared memory so that a thread's part of the product is 16 bytes of a pixel.
#pragma once

#include "_strided_conv_plan.cuh"
#include "_strided_conv_ptx.cuh"
#include "_strided_conv.h"

namespace clone_fast::strided {

constexpr char kOp[] = "strided_conv";

struct Maps {
    CUtensorMap image[4];  // of even rows: even and odd columns; of odd rows likewise. For Up only the first, of all
    CUtensorMap weight;
};

struct Work {
    int chunks, depth;
    int blocks_of_channels, programs;  // that share the tiles of one result and kOut channels
    int tiles_x, tiles_y, tiles;  // in all images of a result
};

// What is counted alike by those who copy and those who multiply: the stage of a ring, and how often it came around.
struct Turn {
    int stage = 0, parity = 0;
    __device__ __forceinline__ void advance(int depth) {
        if (++stage == depth) {
            stage = 0;
            parity ^= 1;
        }
    }
};

struct Place {
    int n, y, x;  // of a tile's first pixel, on the grid of tiles
    template <typename L>
    __device__ __forceinline__ static Place of(int tile, const Work& work, int first_image, L) {
        const int column = tile % work.tiles_x, rest = tile / work.tiles_x;
        return {first_image + rest / work.tiles_y, rest % work.tiles_y * L::kRows, column * kSide};
    }
};

// function(i) for kFirst <= i < kEnd, i a constant.
template <int kFirst, int kEnd, typename Function>
__device__ __forceinline__ void for_each(Function&& function) {
    if constexpr (kFirst < kEnd) {
        function(std::integral_constant<int, kFirst>{});
        for_each<kFirst + 1, kEnd>(function);
    }
}

// The products of one box.
template <typename T, typename Scheme, int kUnit, int kOut, int kBlocks, int kChunk>
__device__ __forceinline__ void multiply_box(float (&sums)[kBlocks][Tile<Scheme, kOut, kBlocks, kChunk>::kSums],
                                             std::uint32_t box, std::uint32_t weights, bool add) {
    using L = Tile<Scheme, kOut, kBlocks, kChunk>;
    const Matrix boxes(box, kBoxColumns * L::kRowBytes, L::kRowBytes), taps(weights, 8 * L::kRowBytes, L::kRowBytes);
    const auto products = [&](auto index, int k) {
        constexpr Tap kTap = Scheme::kTap[kUnit][decltype(index)::value];
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
            Matrix a = boxes, b = taps;
            a.low += L::pixel(kTap.row + block * kSide, kTap.column, k) / 16;
            b.low += L::weight(kTap.slot, k) / 16;
            group_multiply_add<T, kTap.count * kOut>(sums[block] + kTap.first * kOut / 2, a, b,
                                                     add || k > 0 || decltype(index)::value >= Scheme::kFirst);
        }
    };
    // Products of different shape on the same sums have to be kept apart, hence all wide ones first.
    group_fence();
#pragma unroll
    for (int k = 0; k < kChunk / 16; ++k) for_each<0, Scheme::kWide[kUnit]>([&](auto index) { products(index, k); });
    if constexpr (Scheme::kWide[kUnit] < Scheme::kTaps[kUnit]) {
        group_fence();
#pragma unroll
        for (int k = 0; k < kChunk / 16; ++k) {
            for_each<Scheme::kWide[kUnit], Scheme::kTaps[kUnit]>([&](auto index) { products(index, k); });
        }
    }
    group_commit();
}

template <typename T, typename Scheme, int kOut, int kBlocks, int kChunk>
__device__ __forceinline__ void store_tile(const StridedConv& op,
                                           const float (&sums)[kBlocks][Scheme::kPhases * kOut / 2], const Place& at,
                                           int first_channel, int thread) {
    const int warp = thread / 32, lane = thread % 32, channel = first_channel + lane % 4 * 8;
    T* y = static_cast<T*>(op.y) + static_cast<std::int64_t>(at.n) * op.out_height * op.out_width * op.out_channels;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int phase = 0; phase < Scheme::kPhases; ++phase) {
                const int shift = Scheme::kScale == 2 ? op.padding : 0;
                const int y_here = at.y + block * kSide + 2 * warp + half, x_here = at.x + lane / 4;
                const int row = Scheme::kScale * y_here + Scheme::phase_row(phase) - shift;
                const int column = Scheme::kScale * x_here + Scheme::phase_column(phase) - shift;
                const bool inside = static_cast<unsigned>(row) < static_cast<unsigned>(op.out_height) &&
                                    static_cast<unsigned>(column) < static_cast<unsigned>(op.out_width);
                T* to = y + (static_cast<std::int64_t>(row) * op.out_width + column) * op.out_channels + channel;
#pragma unroll
                for (int part = 0; part < kOut / 32; ++part) {
                    std::uint32_t words[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float* pair = sums[block] + phase * kOut / 2 + (4 * part + i) * 4 + 2 * half;
                        words[i] = pack_pair<T>(pair[0], pair[1]);
                    }
                    if (inside && channel + 32 * part < op.out_channels) {
                        store16(to + 32 * part, make_uint4(words[0], words[1], words[2], words[3]));
                    }
                }
            }
        }
    }
}

template <typename T, typename Scheme, int kOut, int kBlocks, int kChunk>
__global__ void __launch_bounds__(kThreads, 1)
    strided_kernel(const __grid_constant__ StridedConv op, const __grid_constant__ Work work,
                   const __grid_constant__ Maps maps) {
    using L = Tile<Scheme, kOut, kBlocks, kChunk>;
    extern __shared__ __align__(1024) unsigned char strided_memory[];
    const auto base = shared_address(strided_memory);
    const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0), lane = threadIdx.x % 32;
    const int group = warp < 4 * kGroups ? warp / 4 : warp - 4 * kGroups;
    const std::uint32_t rings = base + work.chunks * L::kChunkBytes;
    const std::uint32_t ring = rings + group * work.depth * L::kStageBytes;
    const std::uint32_t gates = rings + kGroups * work.depth * L::kStageBytes;
    const auto full = [&](int stage) { return Gate{gates + (group * kMaxDepth + stage) * 8}; };
    const auto empty = [&](int stage) { return Gate{gates + ((kGroups + group) * kMaxDepth + stage) * 8}; };
    const auto loaded = [&](int chunk) { return Gate{gates + (2 * kGroups * kMaxDepth + chunk) * 8}; };

    if (threadIdx.x == 0) {
        for (int i = 0; i < kGroups * kMaxDepth; ++i) {
            Gate{gates + i * 8}.open(1);
            Gate{gates + (kGroups * kMaxDepth + i) * 8}.open(4);
        }
        for (int chunk = 0; chunk < work.chunks; ++chunk) loaded(chunk).open(1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();

    const int first_channel = static_cast<int>(blockIdx.x) % work.blocks_of_channels * kOut;
    const int share = static_cast<int>(blockIdx.x) / work.blocks_of_channels;
    const int result = share / work.programs, first_image = result * (op.n / op.results);
    // The groups of one block are far apart, so that a rest of tiles falls to different blocks.
    const int first = share % work.programs + group * work.programs, step = kGroups * work.programs;
    Turn turn;

    if (warp >= 4 * kGroups) {
        if (lane > 0) return;
        if (group == 0) {
            for (int chunk = 0; chunk < work.chunks; ++chunk) {
                loaded(chunk).expect(L::kChunkBytes);
                for (int slot = 0; slot < 9; ++slot) {
                    const int tap = (result * 9 + Scheme::tap(slot)) * (op.out_channels / 32);
                    load_weights(base + chunk * L::kChunkBytes + slot * L::kTapBytes, maps.weight, loaded(chunk),
                             chunk * kChunk, tap + first_channel / 32);
                }
            }
        }
        int copies = 0;
        for (int tile = first; tile < work.tiles; tile += step) {
            const Place at = Place::of(tile, work, first_image, L{});
            for (int chunk = 0; chunk < work.chunks; ++chunk) {
                for (int unit = 0; unit < Scheme::kUnits; ++unit, ++copies) {
                    if (copies >= work.depth) empty(turn.stage).wait(turn.parity ^ 1);
                    full(turn.stage).expect(L::kBoxBytes);
                    // Up sees the row above and the column before; Down rows and columns 2i + tap - padding.
                    const int row = Scheme::kScale == 2 ? -2 : unit / 2 - op.padding;
                    const int column = Scheme::kScale == 2 ? -2 : unit % 2 - op.padding;
                    const int parity = Scheme::kScale == 2 ? 0 : (row & 1) * 2 + (column & 1);
                    load_box(ring + turn.stage * L::kStageBytes, maps.image[parity], full(turn.stage), chunk * kChunk,
                             at.x + (column >> 1), at.y + (row >> 1), at.n);
                    turn.advance(work.depth);
                }
            }
        }
        return;
    }

    for (int tile = first; tile < work.tiles; tile += step) {
        float sums[kBlocks][L::kSums];
        int before = -1;
        for (int chunk = 0; chunk < work.chunks; ++chunk) {
            loaded(chunk).wait(0);
            for_each<0, Scheme::kUnits>([&](auto unit) {
                constexpr int kUnit = decltype(unit)::value;
                full(turn.stage).wait(turn.parity);
                multiply_box<T, Scheme, kUnit, kOut, kBlocks, kChunk>(
                    sums, ring + turn.stage * L::kStageBytes, base + chunk * L::kChunkBytes, chunk > 0 || kUnit > 0);
                if (before >= 0) {
                    group_wait<1>();
                    if (lane == 0) empty(before).arrive();
                }
                before = turn.stage;
                turn.advance(work.depth);
            });
        }
        group_wait<0>();
        if (lane == 0) empty(before).arrive();
        const Place at = Place::of(tile, work, first_image, L{});
        store_tile<T, Scheme, kOut, kBlocks, kChunk>(op, sums, at, first_channel, threadIdx.x % kGroupThreads);
    }
}

}  // namespace clone_fast::strided

// The part of the upsampling convolution that loads and multiplies: the transposed convolution's four phases.
// See _resampled_conv_up_sm90a.cu.
#pragma once

#include "_resampled_conv_tile.cuh"

namespace clone_fast::resampled {

// By those who filter, and who have nothing else to do yet.
template <typename T>
__device__ __forceinline__ void load_weights(const ResampledConv& op, const Plan& plan, const Segment& segment,
                                             std::uint32_t shared, int thread) {
    const T* weight = static_cast<const T*>(op.weight) + segment.sample * op.weight_stride;
    const int chunks = op.in_channels / 8, chunks_of_group = plan.chunks_of_group.divisor;
#pragma unroll 1
    for (int first = 0; first < kWeightGroups * chunks_of_group; first += chunks_of_group) {
        for (int item = thread; item < kWeightBlocks * kOut * chunks_of_group; item += kTeams * kGroup) {
            std::uint32_t chunk;
            const int row = plan.chunks_of_group.divide(item, chunk), o = row % kOut, tap = row / kOut;
            chunk += first;
            if (static_cast<int>(chunk) >= chunks) continue;
            const int channel = segment.first_channel + o;
            const T* from = weight + (tap * op.out_channels + channel) * op.in_channels + chunk * 8;
            // The lane that will filter holds columns 2q and 2q + 1 of every 8: they are to be channels 8q ... 8q + 7.
            const int place = o % 8 / 2 * 8 + o / 8 * 2 + o % 2;
            copy_async(shared + chunk * kWeightPitch + (block_of_tap(tap) * kOut + place) * kUnit, from,
                       channel < op.out_channels && tap < 9);
        }
        copy_async_commit();
    }
    const auto report = [&](int group) {
        publish();
        if (group * chunks_of_group < chunks) barrier_arrive(kWeightBarrier + group, kThreads);
    };
    static_assert(kWeightGroups == 2);
    copy_async_wait<1>();
    report(0);
    copy_async_wait<0>();
    report(1);
}

// Brings the input to a ring of stages: three rows of 32 pixels, 16 kSlices channels.
template <typename T, int kSlices, int kStages>
struct Loader {
    static constexpr int kChunks = 2 * kSlices, kStage = kChunks * kInputPitch;
    static constexpr int kSpan = kGroup / kChunks < kGrid ? kGroup / kChunks : kGrid;  // pixels of one pass

    const T* from;
    std::uint32_t to;
    int y, x, part = 0, stage = 0;

    __device__ __forceinline__ Loader(const ResampledConv& op, const Segment& segment, std::uint32_t input, int thread)
        : y(segment.y / 2 - 2), x(segment.x / 2 - 1 + thread / kChunks) {
        const int chunk = thread % kChunks, pixel = thread / kChunks;
        const std::int64_t row = static_cast<std::int64_t>(segment.sample) * op.height + y;
        from = static_cast<const T*>(op.x) + (row * op.width + x) * op.in_channels + chunk * 8;
        to = input + chunk * kInputPitch + (1 + pixel) * kUnit;
        if (pixel >= kGrid) x = -kGrid;  // nothing to do
    }

    __device__ __forceinline__ void next(const ResampledConv& op, const Plan& plan) {
#pragma unroll
        for (int row = 0; row < 3; ++row) {
#pragma unroll
            for (int column = 0; column < kGrid; column += kSpan) {
                const bool inside = static_cast<unsigned>(y + row) < static_cast<unsigned>(op.height) &&
                                    static_cast<unsigned>(x + column) < static_cast<unsigned>(op.width);
                if (kGroup / kChunks > kGrid && x < -1) continue;
                copy_async(to + stage * kStage + (row * kGrid + column) * kUnit,
                           from + (row * op.width + column) * op.in_channels, inside);
            }
        }
        copy_async_commit();
        stage = stage + 1 == kStages ? 0 : stage + 1;
        from += 16 * kSlices;
        if (++part == plan.parts) {
            part = 0;
            y += 2;
            from += (2 * op.width - 1) * op.in_channels;
        }
    }
};

// The products of one stage, 16 kSlices input channels, of the two grid rows in it. Begins them; group_wait<0> ends
// them. An instruction takes nearly as long for 32 columns as for 64: so 6 for pairs of phases, not 9 for one each.
template <typename T, int kSlices>
__device__ __forceinline__ void multiply_stage(Sums& sums, std::uint32_t stage, std::uint32_t weight, bool first) {
    constexpr int kHere = kGrid + 1, kLeft = kGrid, kAbove = 1, kAboveLeft = 0;  // shifts, in pixels
    const Matrix a(stage, kInputPitch), b(weight, kWeightPitch);
    group_fence();
#pragma unroll
    for (int k = 0; k < kSlices; ++k) {
        const auto multiply_add = [&](int pair, int shift, int block, int add) {
            group_multiply_add<T>(sums[pair], a, 2 * k * kInputPitch / kUnit + shift, b,
                                  2 * k * kWeightPitch / kUnit + block * kOut, add);
        };
        multiply_add(0, kHere, 0, k > 0 || !first);
        multiply_add(1, kHere, 2, k > 0 || !first);
        multiply_add(0, kLeft, 4, 1);
        multiply_add(1, kAbove, 7, 1);
        multiply_add(0, kAbove, 6, 1);
        multiply_add(0, kAboveLeft, 9, 1);
    }
    group_commit();
}

template <typename T>
__device__ __forceinline__ void store_field(const Sums& sums, std::uint32_t field) {
    const int thread = read_thread() % kGroup;  // read again, so that no register keeps what follows from it
    const int warp = thread / 32, lane = thread % 32;
    constexpr int kPhaseRow[4] = {0, 1, 1, 0}, kPhaseColumn[4] = {0, 0, 1, 1};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int column = warp % 2 * 16 + half * 8 + lane % 8;
        const std::uint32_t rows = field + warp / 2 * 4 * kPlane;
#pragma unroll
        for (int phase = 0; phase < 4; ++phase) {
            std::uint32_t words[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int at = phase % 2 * 16 + 4 * i + 2 * half;
                words[i] = pack_pair<T>(sums[phase / 2][at], sums[phase / 2][at + 1]);
            }
            store_matrices(rows + (kPhaseRow[phase] * 2 + kPhaseColumn[phase]) * kPlane +
                               field_unit(column, lane / 8, kPhaseColumn[phase]),
                           words[0], words[1], words[2], words[3]);
        }
    }
}

template <typename T, int kSlices, int kStages>
__device__ __forceinline__ void multiply(const ResampledConv& op, const Plan& plan, const Segment& segment, int team,
                                         int thread, std::uint32_t weight, std::uint32_t input, std::uint32_t fields) {
    using L = Loader<T, kSlices, kStages>;
    L loader(op, segment, input, thread);
    int left = plan.steps * plan.parts;  // stages to be loaded
    const auto load_next = [&] {
        if (left > 0) loader.next(op, plan);
        else copy_async_commit();
        --left;
    };
    for (int i = 0; i + 1 < kStages; ++i) load_next();

    int stage = 0, buffer = 0;
    Sums sums;
#pragma unroll 1
    for (int step = 0; step < plan.steps; ++step) {
#pragma unroll 1
        for (int part = 0; part < plan.parts; ++part) {
            copy_async_wait<kStages - 2>();
            publish();
            if (step == 0 && part % plan.parts_of_group == 0) {
                barrier_wait(kWeightBarrier + part / plan.parts_of_group, kThreads);
            }
            // All of this stage is there, and everybody is done with the one before.
            barrier_wait(barrier_of(team, kTogether), kGroup);
            multiply_stage<T, kSlices>(sums, input + stage * L::kStage, weight + part * L::kChunks * kWeightPitch,
                                       part == 0);
            load_next();
            group_wait<0>();
            stage = stage + 1 == kStages ? 0 : stage + 1;
        }
        if (step >= kFields) barrier_wait(barrier_of(team, kEmpty + buffer), 2 * kGroup);
        store_field<T>(sums, fields + buffer * kField);
        barrier_arrive(barrier_of(team, kFull + buffer), 2 * kGroup);
        buffer = buffer + 1 == kFields ? 0 : buffer + 1;
    }
}

}  // namespace clone_fast::resampled

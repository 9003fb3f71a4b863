// StyleGAN2's downsampling convolution in one kernel (compute capability 9.0): the 4x4 filter, the 3x3 convolution of
// stride 2, noise, bias, activation and clamp. What lies between the two, the field, never leaves the chip.
//
// A block keeps the weights of 64 output channels in shared memory. Its teams walk down strips of the image, two output
// rows, that is four rows of the field, at a step. In a team one warpgroup per 32 input channels filters: it brings the
// input by cp.async, keeps the last three rows that it has seen in registers, multiplies by the filter as a matrix and
// stores the field, rounded to half precision as PyTorch's is. Even and odd rows and columns lie apart: so all taps of
// the convolution see neighbouring pixels. Another warpgroup multiplies by the weights and finishes from its registers.
// It also copies the last row of the field to where the next step has its first, and the field to memory where a weight
// gradient will want it.
#include "_resampled_conv_down.cuh"

namespace clone_fast {
namespace resampled::down {

template <typename T, int kHalves>
__device__ __forceinline__ void filter(const ResampledConv& op, const Plan& plan, const Segment& segment, int team,
                                       int thread, std::uint32_t input, std::uint32_t fields) {
    using S = Shape<T, kHalves>;
    constexpr int kTurns = 4;  // of a warp in a step
    const int warp = thread / 32 % 4, lane = thread % 32, half = thread / kGroup;
    const TapMatrix taps = load_tap_matrix<T>(op.filter, op.filter_rank, false, 1.0f, lane);
    using Ring = typename S::Ring;
    const T* image = static_cast<const T*>(op.x) +
                     static_cast<std::int64_t>(segment.sample) * op.height * op.width * op.in_channels;
    Ring ring(image, op.height, op.width, op.in_channels, 2 * segment.y - 2, 2 * segment.x - 2, input, thread);
    int left = plan.steps;  // stages to be loaded
    const auto load_next = [&] {
        if (left > 0) ring.next();
        else copy_async_commit();
        --left;
    };
    for (int i = 0; i + 1 < S::kStages; ++i) load_next();

    const std::uint32_t patch = input + Ring::patch_of(thread / 32, lane);
    // What this lane stores the address of: chunk lane / 8 of pixel lane % 8 of a patch's upper two rows.
    const int chunk = 4 * half + lane / 8;
    const int pixel = field_row(1 + lane % 8 / 4, lane % 2) + 2 * warp + lane % 4 / 2;
    const std::uint32_t upper = (chunk * kFieldChunk + pixel) * kUnit;
    constexpr std::uint32_t kLower = kGrid * kUnit;  // rows 3 and 4 lie behind rows 1 and 2

    std::uint32_t kept[kTurns][3][4] = {};
    int stage = 0, buffer = 0;
#pragma unroll 1
    for (int step = 0; step < plan.steps; ++step) {
        copy_async_wait<S::kStages - 2>();
        // All of this stage is there, and everybody is done with the one before.
        barrier_wait(barrier_of(team, kTogether), S::kFilters * kGroup);
        load_next();
        if (step >= kBuffers) barrier_wait(barrier_of(team, kEmpty + buffer), S::kTeamThreads);
#pragma unroll
        for (int n = 0; n < kTurns; ++n) {
            std::uint32_t b[kWindow][4];
            Ring::fetch(b, kept[n], patch + stage * Ring::kStage, n);
            float sums[4][4] = {};
            multiply_patch<T>(sums, taps, b);
            const std::uint32_t to = fields + buffer * S::kField + upper + 8 * n * kUnit;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                store_matrices(to + h * kLower, pack_pair<T>(sums[0][2 * h], sums[0][2 * h + 1]),
                               pack_pair<T>(sums[1][2 * h], sums[1][2 * h + 1]),
                               pack_pair<T>(sums[2][2 * h], sums[2][2 * h + 1]),
                               pack_pair<T>(sums[3][2 * h], sums[3][2 * h + 1]));
            }
        }
        publish();
        barrier_arrive(barrier_of(team, kFull + buffer), S::kTeamThreads);
        stage = stage + 1 == S::kStages ? 0 : stage + 1;
        buffer ^= 1;
    }
}

// By those who multiply, and who have nothing else to do yet.
template <typename T, int kHalves>
__device__ __forceinline__ void load_weights(const ResampledConv& op, const Segment& segment, std::uint32_t shared,
                                             int thread) {
    using S = Shape<T, kHalves>;
    const T* weight = static_cast<const T*>(op.weight) + segment.sample * op.weight_stride;
    for (int item = thread; item < 9 * kOut * S::kChunks; item += S::kTeams * kGroup) {
        const int chunk = item % S::kChunks, o = item / S::kChunks % kOut, tap = item / S::kChunks / kOut;
        const int channel = segment.first_channel + o;
        // A lane gets columns 2q and 2q + 1 of every 8: they are to be channels 8q ... 8q + 7, of 32 each.
        const int place = o / 32 * 32 + o % 8 / 2 * 8 + o % 32 / 8 * 2 + o % 2;
        copy_async(shared + chunk * kWeightPitch + (tap * kOut + place) * kUnit,
                   weight + (tap * op.out_channels + channel) * op.in_channels + chunk * 8, channel < op.out_channels);
    }
    copy_async_commit();
    copy_async_wait<0>();
    publish();
    barrier_wait(kWeightBarrier, S::kTeams * kGroup);
}

// What this team's step has filtered, to memory: the pixels whose own this strip and segment are, of which the blocks of
// output channels, who all filter, share the rows. A warp stores 8 or 4 pixels that are neighbours, and neither chunks
// nor columns that it reads at once share a bank.
template <typename T, int kHalves>
__device__ __forceinline__ void keep(const ResampledConv& op, const Segment& segment, int y, int thread,
                                     std::uint32_t field) {
    using S = Shape<T, kHalves>;
    constexpr int kColumnsOfWarp = kHalves == 1 ? 4 : 2, kTurns = kGrid / kColumnsOfWarp;
    const int warp = thread / 32, lane = thread % 32, rest = lane / 8;
    const int chunk = lane % 4 + (kHalves == 1 ? 0 : 4 * (rest % 2));
    const bool odd = kHalves == 1 ? rest % 2 : rest / 2;
    const int column = lane / 4 % 2 + (kHalves == 1 ? 2 * (rest / 2) : 0);
    const int height = op.height + 1, width = op.width + 1;
    T* const out = static_cast<T*>(op.filtered) +
                   static_cast<std::int64_t>(segment.sample) * height * width * op.in_channels + chunk * 8;
    for (int item = warp; item < 5 * kTurns; item += kGroup / 32) {
        const int row = item / kTurns, at = column + item % kTurns * kColumnsOfWarp;
        const int to_y = 2 * y + row, to_x = 2 * (segment.x + at) + odd;
        // the first row is the last of the step above, the last column the first of the next strip, where there is one
        const bool own = (row > 0 || y == 0) && (at < kColumns || to_x == op.width);
        if (!own || to_y >= height || to_x >= width || to_y % gridDim.y != blockIdx.y) continue;
        store16(out + (static_cast<std::int64_t>(to_y) * width + to_x) * op.in_channels,
                load_shared16(field + (chunk * kFieldChunk + field_row(row, odd) + at) * kUnit));
    }
}

template <typename T, int kHalves>
__device__ __forceinline__ void multiply(const ResampledConv& op, const Plan& plan, const Segment& segment, int team,
                                         int thread, std::uint32_t weight, std::uint32_t fields) {
    using S = Shape<T, kHalves>;
    const int warp = thread / 32, lane = thread % 32, width = op.width / 2, height = op.height / 2;
    // What this lane finishes: columns `column` and `column` + 8 of a row, twice 8 channels.
    const int column = warp % 2 * 16 + lane / 4, channel = segment.first_channel + lane % 4 * 8;
    bool inside[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) inside[h] = column + 8 * h < kColumns && segment.x + column + 8 * h < width;

    float bias[2][8] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        if (op.bias == nullptr || channel + 32 * i >= op.out_channels) continue;
#pragma unroll
        for (int c = 0; c < 8; ++c) bias[i][c] = load_number<T>(op.bias, channel + 32 * i + c, op.bias_float) * op.gain;
    }
    float strength = op.gain;
    if (op.strength != nullptr) strength *= load_number<T>(op.strength, 0, op.strength_float);
    const std::uint32_t high = pack_pair<T>(op.clamp, op.clamp), low = pack_pair<T>(-op.clamp, -op.clamp);

    // The last row of a field is the first of the next.
    const auto hand_on = [&](std::uint32_t field, std::uint32_t next) {
#pragma unroll
        for (int item = thread; item < 2 * kGrid * S::kChunks; item += kGroup) {
            const bool odd = item / kGrid % 2;
            const int chunk_at = item / (2 * kGrid) * kFieldChunk, at = item % kGrid;
            store_shared16(next + (chunk_at + field_row(0, odd) + at) * kUnit,
                           load_shared16(field + (chunk_at + field_row(4, odd) + at) * kUnit));
        }
        publish();
    };
    const auto release = [&](int step, int buffer) {
        if (step + kBuffers < plan.steps) barrier_arrive(barrier_of(team, kEmpty + buffer), S::kTeamThreads);
    };
    barrier_wait(barrier_of(team, kFull), S::kTeamThreads);
    hand_on(fields, fields + S::kField);
    release(0, 0);
    int buffer = 1, y = segment.y + warp / 2;
#pragma unroll 1
    for (int step = 1; step < plan.steps; ++step, y += kRows) {
        const std::uint32_t field = fields + buffer * S::kField;
        barrier_wait(barrier_of(team, kFull + buffer), S::kTeamThreads);
        float sums[2][32];  // every second product each: one that adds to the last waits for it
        const Matrix a(field, kFieldChunk * kUnit), b(weight, kWeightPitch);
        group_fence();
#pragma unroll
        for (int k = 0; k < 2 * kHalves; ++k) {
#pragma unroll
            for (int tap = 0; tap < 9; ++tap) {
                const int number = 9 * k + tap, dy = tap / 3, dx = tap % 3;
                group_multiply_add<T>(sums[number % 2], a, 2 * k * kFieldChunk + field_row(dy, dx == 1) + dx / 2, b,
                                      2 * k * kWeightPitch / kUnit + tap * kOut, number >= 2);
            }
        }
        group_commit();
        const std::int64_t pixel_at = static_cast<std::int64_t>(y) * width + segment.x + column;
        float noise[2] = {};
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            if (op.noise == nullptr || !inside[h] || y >= height) continue;
            noise[h] = load_number<T>(op.noise, segment.sample * op.noise_stride + pixel_at + 8 * h, op.noise_float);
        }
        if (step + 1 < plan.steps) hand_on(field, fields + (buffer ^ 1) * S::kField);
        if (op.filtered != nullptr) keep<T, kHalves>(op, segment, segment.y + (step - 1) * kRows, thread, field);
        group_wait<0>();
        release(step, buffer);
        buffer ^= 1;
        if (y >= height) continue;

        const std::int64_t first_pixel = static_cast<std::int64_t>(segment.sample) * height * width;
        T* out = static_cast<T*>(op.y) + (first_pixel + pixel_at) * op.out_channels + channel;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float added = noise[h] * strength;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                std::uint32_t words[4];
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    float v[2];
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const int at = 16 * i + 4 * j + 2 * h + e;
                        v[e] = fmaf(sums[0][at] + sums[1][at], op.gain, bias[i][2 * j + e] + added);
                        v[e] = fmaxf(v[e], v[e] * op.slope);
                    }
                    words[j] = limited_pair<T>(pack_pair<T>(v[0], v[1]), low, high);
                }
                if (inside[h] && channel + 32 * i < op.out_channels) {
                    store16(out + 8 * h * op.out_channels + 32 * i, make_uint4(words[0], words[1], words[2], words[3]));
                }
            }
        }
    }
}

template <typename T, int kHalves>
__global__ void __launch_bounds__(Shape<T, kHalves>::kThreads, 1) down_kernel(const ResampledConv op, const Plan plan) {
    using S = Shape<T, kHalves>;
    extern __shared__ __align__(128) unsigned char shared[];
    // Read from one lane, so that the compiler knows that a warp takes one branch.
    const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kGroup, 0);
    const bool multiplies = warpgroup < S::kTeams;
    const int team = warpgroup % S::kTeams, item = blockIdx.x * S::kTeams + team;
    const int strip = item % plan.strips, run = item / plan.strips;
    const Segment segment{static_cast<int>(blockIdx.z), static_cast<int>(blockIdx.y) * kOut, strip * kColumns,
                          run * (plan.steps - 1) * kRows};
    const bool idle = run >= plan.segments;  // the second team of the last block
    const std::uint32_t weight = shared_address(shared), fields = weight + S::kWeightBytes + team * S::kTeamBytes;
    const std::uint32_t input = fields + kBuffers * S::kField;
    if (multiplies) {
        load_weights<T, kHalves>(op, segment, weight, threadIdx.x);
        if (!idle) multiply<T, kHalves>(op, plan, segment, team, threadIdx.x % kGroup, weight, fields);
    } else if (!idle) {
        const int thread = (warpgroup / S::kTeams - 1) * kGroup + threadIdx.x % kGroup;
        filter<T, kHalves>(op, plan, segment, team, thread, input, fields);
    }
}

Plan plan_of(const ResampledConv& op, int teams) {
    Plan plan{};
    plan.strips = ceil_div(op.width / 2, kColumns);
    const std::int64_t others = static_cast<std::int64_t>(op.n) * ceil_div(op.out_channels, kOut);
    const std::int64_t processors = multiprocessors(kOp);
    const int height = op.height / 2;
    constexpr int kStart = 3;  // what a block costs before its first step, in steps
    std::int64_t best = -1;
    for (int steps = ceil_div(height, kRows) + 1; steps > 1; --steps) {
        const int segments = ceil_div(height, (steps - 1) * kRows), blocks = ceil_div(plan.strips * segments, teams);
        const std::int64_t cost = ceil_div(blocks * others, processors) * (steps + kStart);
        if (best >= 0 && cost >= best) continue;
        best = cost;
        plan.steps = steps, plan.segments = segments, plan.blocks = blocks;
    }
    return plan;
}

template <typename T, int kHalves>
void launch_down(const ResampledConv& op, cudaStream_t stream) {
    using S = Shape<T, kHalves>;
    const Plan plan = plan_of(op, S::kTeams);
    allow_shared_memory(down_kernel<T, kHalves>, S::kSharedBytes, kOp);
    const dim3 blocks(plan.blocks, ceil_div(op.out_channels, kOut), op.n);
    down_kernel<T, kHalves><<<blocks, S::kThreads, S::kSharedBytes, stream>>>(op, plan);
    check_launch(kOp);
}

template <typename T>
void launch_down(const ResampledConv& op, cudaStream_t stream) {
    if (op.in_channels == 32) return launch_down<T, 1>(op, stream);
    if (op.in_channels == 64) return launch_down<T, 2>(op, stream);
    fail(kOp, "channels that no kernel exists for");
}

}  // namespace resampled::down

void resampled_conv_down(const ResampledConv& op, cudaStream_t stream) {
    if (op.dtype == Dtype::bfloat16) return resampled::down::launch_down<Bfloat>(op, stream);
    if (op.dtype == Dtype::float16) return resampled::down::launch_down<Half>(op, stream);
    fail(resampled::down::kOp, "half precision only");
}

}  // namespace clone_fast

// StyleGAN2's upsampling convolution in one kernel (compute capability 9.0): the transposed 3x3 convolution of stride 2,
// the 4x4 filter, noise, bias, activation and clamp. What lies between convolution and filter never leaves the chip.
//
// The transposed convolution's result, the field, has four phases: its even and odd rows and columns. A field row 2p
// gets input row p by tap 0 and input row p - 1 by tap 2, a field row 2p + 1 gets input row p by tap 1; columns alike. So
// on the grid of the input's pixels each phase is a small matrix product, with 4, 2, 2 and 1 taps, and the shift (0, 0) of
// the input serves all four phases in one instruction, (0, -1) and (-1, 0) serve two, (-1, -1) serves one.
//
// A block keeps the weights of 32 output channels in shared memory. It has two teams; each walks down a strip of the
// image, two grid rows (four field rows, four output rows) at a step. In a team one warpgroup multiplies: it brings the
// input by cp.async and puts the field into shared memory, rounded to half precision as PyTorch's is. The other filters:
// a thread owns 4 columns x 4 channels, runs down the rows with the unfinished sums of three output rows in registers, so
// no field row is computed or read twice, and stores finished pixels. The two overlap; the tensor cores belong to the
// one, the arithmetic units to the other.
//
// Shared memory, in units of 16 bytes = 8 channels:
//   weight  [chunk of channels][tap, output channel], the taps in the order of the shifts and phases above
//   input   [chunk of channels][pixel]: three rows of 32 pixels (the first belongs to the step before), one behind the
//           other. So the pixels of a shift lie as those of its neighbour, some units earlier.
//   field   [row][even or odd columns][column][4 units]: units are permuted so that neither writing nor reading meets
//           bank conflicts.
#include "_resampled_conv.h"
#include "_resampled_conv_ptx.cuh"

namespace clone_fast {
namespace resampled {

constexpr char kOp[] = "modulated_conv2d (up)";
constexpr int kUnit = 16;
constexpr int kOut = 32;  // output channels of a block
constexpr int kGrid = 32;  // grid columns of a strip
constexpr int kColumns = 2 * (kGrid - 2);  // output columns of a strip
constexpr int kRows = 4;  // output rows of a step
constexpr int kGroup = 128;  // threads of a warpgroup
constexpr int kTeams = 2;
constexpr int kThreads = 2 * kTeams * kGroup;
constexpr int kStages = 2;
constexpr int kInputPixels = 3 * kGrid;
constexpr int kInputPitch = (kInputPixels + 1) * kUnit;  // odd in units: the chunks of a pixel lie in different banks
constexpr int kWeightPitch = (9 * kOut + 1) * kUnit;
constexpr int kPlane = kGrid * kOut * 2;  // bytes of the even or the odd columns of a field row
constexpr int kField = kRows * 2 * kPlane;

// How a launch is cut up. A segment is what a team does: `steps` steps of a strip, the first of which gives no output.
struct Plan {
    int strips, segments, steps, fields;  // fields: buffers between multiplying and filtering, 1 or 2
    int weight_bytes, shared_bytes, blocks;
    int noise_vectors;  // 1: the noise of 4 neighbouring columns can be loaded at once
};

struct Segment {
    int sample, first_channel, x, y;  // of the output
};

// The named barriers of a team.
enum Barrier { kTogether, kFull, kEmpty = kFull + 2, kBarriers = kEmpty + 2 };
__device__ __forceinline__ int barrier_of(int team, int which) { return 1 + team * kBarriers + which; }

// Of a grid position, for each phase: 8 columns of 8 output channels are 4 of a lane's 16 numbers.
using Sums = float[4][16];

template <typename T>
__device__ __forceinline__ float load_number(const void* from, std::int64_t index, int is_float) {
    return is_float ? static_cast<const float*>(from)[index] : to_float(static_cast<const T*>(from)[index]);
}

// Where a tap's 32 output channels lie among the 9 x 32 of a chunk. Phases in the order (odd row, even column), (even,
// even), (even, odd), (odd, odd): those of one shift are neighbours, in the weights as in the accumulators.
__device__ __forceinline__ int tap_slot(int tap) {  // 1, 2, 5, 0, 3, 4, 6, 7, 8 of taps 0 ... 8
    return static_cast<int>(0x876430521ull >> (4 * tap) & 15);
}

template <typename T>
__device__ __forceinline__ void load_weights(const ResampledConv& op, const Segment& segment, std::uint32_t shared) {
    const T* weight = static_cast<const T*>(op.weight) + segment.sample * op.weight_stride;
    const int chunks = op.in_channels / 8, items = 9 * kOut * chunks;
    for (int item = threadIdx.x; item < items; item += kThreads) {
        const int chunk = item % chunks, row = item / chunks, o = row % kOut, tap = row / kOut;
        const int channel = segment.first_channel + o;
        const bool inside = channel < op.out_channels;
        const T* from = weight + (static_cast<std::int64_t>(tap) * op.out_channels + channel) * op.in_channels + chunk * 8;
        copy_async(shared + chunk * kWeightPitch + (tap_slot(tap) * kOut + o) * kUnit, inside ? from : weight, inside);
    }
}

// Three input rows from image row y, 32 columns from x, kChunks x 8 channels from `channel`.
template <typename T, int kChunks>
__device__ __forceinline__ void load_input(const ResampledConv& op, const T* image, int x, int y, int channel,
                                           std::uint32_t stage, int thread) {
    const int chunk = thread % kChunks;
#pragma unroll
    for (int first = 0; first < kInputPixels * kChunks; first += kGroup) {
        const int pixel = (first + thread) / kChunks;
        if (kInputPixels * kChunks % kGroup && pixel >= kInputPixels) break;
        const int row = y + pixel / kGrid, column = x + pixel % kGrid;
        const bool inside = static_cast<unsigned>(row) < static_cast<unsigned>(op.height) &&
                            static_cast<unsigned>(column) < static_cast<unsigned>(op.width);
        const T* from = image + (row * op.width + column) * op.in_channels + channel + chunk * 8;
        copy_async(stage + chunk * kInputPitch + (1 + pixel) * kUnit, inside ? from : image, inside);
    }
}

// The products of one stage, 16 kSlices input channels, of the two grid rows in it. `pixels` is where this lane's row of
// the input matrix lies. A slice is loaded while the tensor cores work on the one before.
template <typename T, int kSlices>
__device__ __forceinline__ void multiply_stage(Sums& sums, std::uint32_t pixels, std::uint32_t weight, bool first) {
    const Matrix b(weight, kWeightPitch);
    std::uint32_t a[2][4][4];
#pragma unroll
    for (int k = 0; k < kSlices; ++k) {
        auto& shifts = a[k % 2];
        if (k >= 1) group_wait<1>();
        const std::uint32_t from = pixels + 2 * k * kInputPitch;
        load_matrices(shifts[0], from + (kGrid + 1) * kUnit);  // (0, 0)
        load_matrices(shifts[1], from + kGrid * kUnit);  // (0, -1)
        load_matrices(shifts[2], from + kUnit);  // (-1, 0)
        load_matrices(shifts[3], from);  // (-1, -1)
        const auto multiply_add = [&](int phase, int shift, int slot, int add = 1) {
            group_multiply_add<T>(sums[phase], shifts[shift], b, 2 * k * kWeightPitch / kUnit + slot * kOut, add);
        };
        group_fence();
#pragma unroll
        for (int phase = 0; phase < 4; ++phase) multiply_add(phase, 0, phase, k > 0 || !first);
        multiply_add(0, 1, 4);
        multiply_add(1, 1, 5);
        multiply_add(1, 2, 6);
        multiply_add(2, 2, 7);
        multiply_add(1, 3, 8);
        group_commit();
    }
    group_wait<0>();
}

// Within a plane of the field a column's 64 bytes are at `place`, their 16-byte units permuted by `twist`: writers of
// 8 neighbouring columns and readers of columns 2 apart then touch each bank once.
__device__ __forceinline__ int field_place(int column) {
    return (column & ~3) | (column & 1) << 1 | (column >> 1 & 1);
}
__device__ __forceinline__ int field_unit(int column, int unit) {
    const int place = field_place(column);
    return place * 64 + (unit ^ (place >> 1 & 3)) * kUnit;
}

template <typename T>
__device__ __forceinline__ void store_field(const Sums& sums, std::uint32_t field, int thread) {
    const int warp = thread / 32, lane = thread % 32;
    constexpr int kPhaseRow[4] = {1, 0, 0, 1}, kPhaseColumn[4] = {0, 0, 1, 1};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int column = warp % 2 * 16 + half * 8 + lane % 8;
        const std::uint32_t to = field + warp / 2 * 4 * kPlane + field_unit(column, lane / 8);
#pragma unroll
        for (int phase = 0; phase < 4; ++phase) {
            std::uint32_t words[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                words[i] = pack_pair<T>(sums[phase][4 * i + 2 * half], sums[phase][4 * i + 2 * half + 1]);
            }
            store_matrices(to + (kPhaseRow[phase] * 2 + kPhaseColumn[phase]) * kPlane, words[0], words[1], words[2],
                           words[3]);
        }
    }
}

template <typename T, int kSlices>
__device__ __forceinline__ void multiply(const ResampledConv& op, const Plan& plan, const Segment& segment, int team,
                                         int thread, std::uint32_t weight, std::uint32_t input, std::uint32_t fields) {
    constexpr int kChunks = 2 * kSlices, kStage = kChunks * kInputPitch;
    const T* image = static_cast<const T*>(op.x) + static_cast<std::int64_t>(segment.sample) * op.height * op.width *
                                                       op.in_channels;
    const int x = segment.x / 2 - 1, parts = op.in_channels / (16 * kSlices);
    int y = segment.y / 2 - 2, next_part = 0, stage = 0;
    const auto load_next = [&](int stage) {
        load_input<T, kChunks>(op, image, x, y, next_part * 16 * kSlices, input + stage * kStage, thread);
        copy_async_commit();
        if (++next_part == parts) next_part = 0, y += 2;
    };
    load_next(0);
    const int lane = thread % 32;
    const std::uint32_t pixels = input + lane / 16 * kInputPitch + (thread / 32 * 16 + lane % 16) * kUnit;
    Sums sums;
    for (int step = 0; step < plan.steps; ++step) {
        for (int part = 0; part < parts; ++part, stage = kStages - 1 - stage) {
            copy_async_wait<0>();
            // All of this stage is there, and everybody is done with the other one.
            barrier_wait(barrier_of(team, kTogether), kGroup);
            if (step + 1 < plan.steps || part + 1 < parts) load_next(kStages - 1 - stage);
            multiply_stage<T, kSlices>(sums, pixels + stage * kStage, weight + part * kChunks * kWeightPitch, part == 0);
        }
        const int buffer = plan.fields == 2 ? step % 2 : 0;
        if (step >= plan.fields) barrier_wait(barrier_of(team, kEmpty + buffer), 2 * kGroup);
        store_field<T>(sums, fields + buffer * kField, thread);
        barrier_arrive(barrier_of(team, kFull + buffer), 2 * kGroup);
    }
}

// The filter as it meets the field's rows and columns, times all gains. A filter that is an outer product, as nearly all
// are, needs 8 multiplications for an output instead of 16.
struct Taps {
    float full[4][4];
    float rows[4], columns[4];
    bool separable;
};

__device__ __forceinline__ Taps load_taps(const ResampledConv& op) {
    Taps taps;
    const float gain = 4.0f * op.gain;
    if (op.filter_rank == 1) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            taps.rows[i] = op.filter[3 - i];
            taps.columns[i] = op.filter[3 - i] * gain;
        }
        taps.separable = true;
        return taps;
    }
    float pivot = 0.0f, scale = 0.0f;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        taps.full[i / 4][i % 4] = op.filter[15 - i];
        pivot = fmaxf(pivot, fabsf(taps.full[i / 4][i % 4]));
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) {  // the row and the column of the largest tap span an outer product
        if (fabsf(taps.full[i / 4][i % 4]) != pivot) continue;
        scale = 1.0f / taps.full[i / 4][i % 4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            taps.rows[j] = taps.full[j][i % 4];
            taps.columns[j] = taps.full[i / 4][j];
        }
    }
    taps.separable = true;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        const float product = taps.rows[i / 4] * (taps.columns[i % 4] * scale);
        if (!(fabsf(product - taps.full[i / 4][i % 4]) <= 1e-6f * pivot)) taps.separable = false;
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) taps.full[i / 4][i % 4] *= gain;
#pragma unroll
    for (int i = 0; i < 4; ++i) taps.columns[i] *= scale * gain;
    return taps;
}

template <typename T>
__device__ __forceinline__ float2 unpack_pair(std::uint32_t word) {
    if constexpr (std::is_same_v<T, Bfloat>) {
        return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
    } else {
        const __half2_raw raw{static_cast<unsigned short>(word & 0xffffu), static_cast<unsigned short>(word >> 16)};
        return __half22float2(__half2(raw));
    }
}

// Unlike max and min of floats these keep NaN, as torch.clamp does.
template <typename T>
__device__ __forceinline__ std::uint32_t clamp_pair(std::uint32_t word, std::uint32_t low, std::uint32_t high) {
    if constexpr (std::is_same_v<T, Bfloat>) {
        asm("min.NaN.bf16x2 %0, %0, %1;" : "+r"(word) : "r"(high));
        asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(word) : "r"(low));
    } else {
        asm("min.NaN.f16x2 %0, %0, %1;" : "+r"(word) : "r"(high));
        asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(word) : "r"(low));
    }
    return word;
}

// The noise of columns x ... x + 3 of one row, rounded to T.
template <typename T>
__device__ __forceinline__ uint2 load_noise(const ResampledConv& op, const Plan& plan, std::int64_t at, int columns) {
    if (columns <= 0) return make_uint2(0, 0);
    if (plan.noise_vectors && !op.noise_float) {
        return *reinterpret_cast<const uint2*>(static_cast<const T*>(op.noise) + at);
    }
    float values[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (i < columns) values[i] = load_number<T>(op.noise, at + i, op.noise_float);
    }
    return make_uint2(pack_pair<T>(values[0], values[1]), pack_pair<T>(values[2], values[3]));
}

template <typename T, bool kSeparable>
__device__ __forceinline__ void filter(const ResampledConv& op, const Plan& plan, const Segment& segment, int team,
                                       int thread, std::uint32_t fields, const Taps& taps) {
    const int group = thread / 8, quad = thread % 8;
    const int width = 2 * op.width, height = 2 * op.height;
    const int x = segment.x + 4 * group, channel = segment.first_channel + 4 * quad;
    const int columns = group < kColumns / 4 && channel < op.out_channels ? width - x : 0;  // to be stored
    std::uint32_t offsets[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) offsets[i] = field_unit(min(2 * group + i, kGrid - 1), quad / 2) + quad % 2 * 8;

    float bias[4] = {};
    if (op.bias != nullptr && columns > 0) {
#pragma unroll
        for (int c = 0; c < 4; ++c) bias[c] = load_number<T>(op.bias, channel + c, op.bias_float) * op.gain;
    }
    const float strength = op.strength == nullptr ? op.gain : load_number<T>(op.strength, 0, op.strength_float) * op.gain;
    const std::uint32_t high = pack_pair<T>(op.clamp, op.clamp), low = pack_pair<T>(-op.clamp, -op.clamp);
    std::int64_t noise_at = segment.sample * op.noise_stride + static_cast<std::int64_t>(segment.y) * width + x;
    T* out = static_cast<T*>(op.y) +
             ((static_cast<std::int64_t>(segment.sample) * height + segment.y) * width + x) * op.out_channels + channel;
    const int row_stride = width * op.out_channels;

    float sums[3][4][4] = {};  // of the three unfinished rows: columns, channels
    int y = segment.y - kRows;
    for (int step = 0; step < plan.steps; ++step, y += kRows) {
        uint2 noise[kRows];
#pragma unroll
        for (int j = 0; j < kRows; ++j) {
            const bool wanted = op.noise != nullptr && step > 0 && y + j < height;
            noise[j] = load_noise<T>(op, plan, noise_at, wanted ? columns : 0);
            if (step > 0) noise_at += width;
        }
        const int buffer = plan.fields == 2 ? step % 2 : 0;
        const std::uint32_t field = fields + buffer * kField;
        barrier_wait(barrier_of(team, kFull + buffer), 2 * kGroup);
#pragma unroll
        for (int j = 0; j < kRows; ++j) {
            uint2 raw[7];
#pragma unroll
            for (int i = 0; i < 7; ++i) {  // odd, even, odd, ... columns
                raw[i] = load_shared8(field + offsets[(i + 1) / 2] + (2 * j + (i + 1) % 2) * kPlane);
            }
            if (j + 1 == kRows && step + plan.fields < plan.steps) {
                barrier_arrive(barrier_of(team, kEmpty + buffer), 2 * kGroup);
            }
            float done[4][4];
#pragma unroll
            for (int pair = 0; pair < 2; ++pair) {
                float2 t[7];
#pragma unroll
                for (int i = 0; i < 7; ++i) t[i] = unpack_pair<T>(pair == 0 ? raw[i].x : raw[i].y);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const int c = 2 * pair + e;
                        const auto dot = [&](const float (&f)[4], float sum) {
#pragma unroll
                            for (int k = 0; k < 4; ++k) sum = fmaf(f[k], e == 0 ? t[i + k].x : t[i + k].y, sum);
                            return sum;
                        };
                        if constexpr (kSeparable) {
                            const float across = dot(taps.columns, 0.0f);
                            done[i][c] = fmaf(taps.rows[3], across, sums[0][i][c]);
                            sums[0][i][c] = fmaf(taps.rows[2], across, sums[1][i][c]);
                            sums[1][i][c] = fmaf(taps.rows[1], across, sums[2][i][c]);
                            sums[2][i][c] = fmaf(taps.rows[0], across, bias[c]);
                        } else {
                            done[i][c] = dot(taps.full[3], sums[0][i][c]);
                            sums[0][i][c] = dot(taps.full[2], sums[1][i][c]);
                            sums[1][i][c] = dot(taps.full[1], sums[2][i][c]);
                            sums[2][i][c] = dot(taps.full[0], bias[c]);
                        }
                    }
                }
            }
            if (step == 0) continue;
            const float2 noise01 = unpack_pair<T>(noise[j].x), noise23 = unpack_pair<T>(noise[j].y);
            const float added[4] = {noise01.x * strength, noise01.y * strength, noise23.x * strength, noise23.y * strength};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float v[4];
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    v[c] = done[i][c] + added[i];
                    v[c] = fmaxf(v[c], v[c] * op.slope);
                }
                if (y + j < height && i < columns) {
                    *reinterpret_cast<uint2*>(out + i * op.out_channels) =
                        make_uint2(clamp_pair<T>(pack_pair<T>(v[0], v[1]), low, high),
                                   clamp_pair<T>(pack_pair<T>(v[2], v[3]), low, high));
                }
            }
            out += row_stride;
        }
    }
}

template <typename T, int kSlices>
__global__ void __launch_bounds__(kThreads, 1) up_kernel(const ResampledConv op, const Plan plan) {
    extern __shared__ __align__(128) unsigned char shared[];
    // Read from one lane, so that the compiler knows that a warp takes one branch.
    const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kGroup, 0), team = warpgroup % kTeams, thread = threadIdx.x % kGroup;
    const int item = blockIdx.x * kTeams + team, strip = item % plan.strips, run = item / plan.strips;
    const Segment segment{static_cast<int>(blockIdx.z), static_cast<int>(blockIdx.y) * kOut, strip * kColumns,
                          run * (plan.steps - 1) * kRows};
    const std::uint32_t weight = shared_address(shared), input = weight + plan.weight_bytes,
                        fields = input + kTeams * kStages * 2 * kSlices * kInputPitch;
    load_weights<T>(op, segment, weight);
    copy_async_commit();
    copy_async_wait<0>();
    publish();
    __syncthreads();
    if (run >= plan.segments) return;
    const std::uint32_t own_fields = fields + team * plan.fields * kField;
    if (warpgroup < kTeams) {
        multiply<T, kSlices>(op, plan, segment, team, thread, weight, input + team * kStages * 2 * kSlices * kInputPitch,
                             own_fields);
    } else {
        const Taps taps = load_taps(op);
        if (taps.separable) filter<T, true>(op, plan, segment, team, thread, own_fields, taps);
        else filter<T, false>(op, plan, segment, team, thread, own_fields, taps);
    }
}

int shared_bytes(int in_channels, int slices, int fields) {
    return in_channels / 8 * kWeightPitch + kTeams * (kStages * 2 * slices * kInputPitch + fields * kField);
}

int slices_of(int in_channels) { return in_channels % 64 == 0 ? 4 : in_channels % 32 == 0 ? 2 : 1; }

Plan plan_of(const ResampledConv& op) {
    const int slices = slices_of(op.in_channels), limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, kOp);
    Plan plan{};
    plan.fields = shared_bytes(op.in_channels, slices, 2) <= limit ? 2 : 1;
    plan.weight_bytes = op.in_channels / 8 * kWeightPitch;
    plan.shared_bytes = shared_bytes(op.in_channels, slices, plan.fields);
    if (plan.shared_bytes > limit) fail(kOp, "the weights do not fit into shared memory");
    plan.strips = ceil_div(2 * op.width, kColumns);
    const std::int64_t others = static_cast<std::int64_t>(op.n) * ceil_div(op.out_channels, kOut);
    const int processors = multiprocessors(kOp), height = 2 * op.height;
    constexpr int kStart = 3;  // what a block costs before its first step, in steps
    std::int64_t best = -1;
    for (int steps = ceil_div(height, kRows) + 1; steps > 1; --steps) {
        const int segments = ceil_div(height, (steps - 1) * kRows);
        const int blocks = ceil_div(plan.strips * segments, kTeams);
        const std::int64_t cost = ceil_div(blocks * others, processors) * (steps + kStart);
        if (best >= 0 && cost >= best) continue;
        best = cost;
        plan.steps = steps;
        plan.segments = segments;
        plan.blocks = blocks;
    }
    const int wide = op.noise_float ? 16 : 8;
    plan.noise_vectors = op.width % 2 == 0 && op.noise_stride % 4 == 0 && is_aligned(op.noise, wide);
    return plan;
}

template <typename T, int kSlices>
void launch_up(const ResampledConv& op, const Plan& plan, cudaStream_t stream) {
    allow_shared_memory(up_kernel<T, kSlices>, plan.shared_bytes, kOp);
    const dim3 blocks(plan.blocks, ceil_div(op.out_channels, kOut), op.n);
    up_kernel<T, kSlices><<<blocks, kThreads, plan.shared_bytes, stream>>>(op, plan);
    check_launch(kOp);
}

template <typename T>
void launch_up(const ResampledConv& op, cudaStream_t stream) {
    const Plan plan = plan_of(op);
    switch (slices_of(op.in_channels)) {
        case 4: return launch_up<T, 4>(op, plan, stream);
        case 2: return launch_up<T, 2>(op, plan, stream);
        default: return launch_up<T, 1>(op, plan, stream);
    }
}

}  // namespace resampled

int resampled_conv_up_shared_memory(int in_channels) {
    return resampled::shared_bytes(in_channels, resampled::slices_of(in_channels), 1);
}

void resampled_conv_up(const ResampledConv& op, cudaStream_t stream) {
    if (op.dtype == Dtype::bfloat16) return resampled::launch_up<Bfloat>(op, stream);
    if (op.dtype == Dtype::float16) return resampled::launch_up<Half>(op, stream);
    fail(resampled::kOp, "half precision only");
}

}  // namespace clone_fast

// StyleGAN2's upsampling convolution in one kernel (compute capability 9.0): the transposed 3x3 convolution of stride
// 2, the 4x4 filter, noise, bias, activation and clamp. What lies between the two never leaves the chip.
//
// The transposed convolution's result, the field, has four phases: its even and odd rows and columns. A field row 2p
// gets input row p by tap 0 and input row p - 1 by tap 2, a field row 2p + 1 gets input row p by tap 1; columns alike.
// So on the grid of the input's pixels each phase is a small matrix product, with 4, 2, 2 and 1 taps; the input at shift
// (0, 0) is a factor of all four, at (0, -1) and (-1, 0) of two, at (-1, -1) of one. Two phases are multiplied at once.
//
// A block keeps the weights of 32 output channels in shared memory. It has two teams; each walks down a strip of the
// image, two grid rows (four field rows, four output rows) at a step. In a team one warpgroup multiplies: it brings the
// input by cp.async and puts the field into shared memory, rounded to half precision as PyTorch's is. The other filters
// and stores finished pixels, 4 x 4 at a time, from the buffer of this step and the last rows of the one before. The
// two warpgroups overlap, and so do the two teams.
//
// Shared memory, in units of 16 bytes = 8 channels:
//   weight  [chunk of channels][tap, output channel], the taps in the order of block_of_tap
//   input   [chunk of channels][pixel]: three rows of 32 pixels (the first belongs to the step before), one behind the
//           other. So the pixels of a shift lie as those of its neighbour, some units earlier.
//   field   [row][even or odd columns][column][4 units]: units are permuted so that neither writing nor reading meets
//           bank conflicts.
#include "_resampled_conv_filter.cuh"
#include "_resampled_conv_multiply.cuh"

namespace clone_fast {
namespace resampled {

template <typename T, int kSlices, int kStages>
__global__ void __launch_bounds__(kThreads, 1) up_kernel(const ResampledConv op, const Plan plan) {
    extern __shared__ __align__(128) unsigned char shared[];
    // Read from one lane, so that the compiler knows that a warp takes one branch.
    const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kGroup, 0);
    const int team = warpgroup % kTeams, thread = threadIdx.x % kGroup;
    const int item = blockIdx.x * kTeams + team, strip = item % plan.strips, run = item / plan.strips;
    const Segment segment{static_cast<int>(blockIdx.z), static_cast<int>(blockIdx.y) * kOut, strip * kColumns,
                          run * (plan.steps - 1) * kRows};
    const bool idle = run >= plan.segments;  // the second team of the last block
    constexpr int kRing = kStages * 2 * kSlices * kInputPitch;
    const std::uint32_t weight = shared_address(shared), input = weight + plan.weight_bytes + team * kRing;
    const std::uint32_t fields = weight + plan.weight_bytes + kTeams * kRing + team * kFields * kField;
    if (warpgroup < kTeams) {
        if (!idle) return multiply<T, kSlices, kStages>(op, plan, segment, team, thread, weight, input, fields);
        for (int part = 0; part < plan.parts; part += plan.parts_of_group) {
            barrier_wait(kWeightBarrier + part / plan.parts_of_group, kThreads);
        }
    } else {
        load_weights<T>(op, plan, segment, weight, team * kGroup + thread);
        if (!idle) filter<T>(op, plan, segment, team, thread, fields);
    }
}

template <int kSlices, int kStages>
Plan plan_of(const ResampledConv& op) {
    Plan plan{};
    plan.weight_bytes = ceil_div(op.in_channels / 8 * kWeightPitch, 128) * 128;
    plan.shared_bytes = plan.weight_bytes + kTeams * (kStages * 2 * kSlices * kInputPitch + kFields * kField);
    plan.parts = op.in_channels / (16 * kSlices);
    plan.parts_of_group = ceil_div(plan.parts, kWeightGroups);
    plan.chunks_of_group = Divider(plan.parts_of_group * 2 * kSlices);
    plan.strips = ceil_div(2 * op.width, kColumns);
    const std::int64_t others = static_cast<std::int64_t>(op.n) * ceil_div(op.out_channels, kOut);
    const std::int64_t processors = multiprocessors(kOp);
    const int height = 2 * op.height;
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
    return plan;
}

template <typename T, int kSlices, int kStages>
void launch_up(const ResampledConv& op, cudaStream_t stream) {
    const Plan plan = plan_of<kSlices, kStages>(op);
    allow_shared_memory(up_kernel<T, kSlices, kStages>, plan.shared_bytes, kOp);
    const dim3 blocks(plan.blocks, ceil_div(op.out_channels, kOut), op.n);
    up_kernel<T, kSlices, kStages><<<blocks, kThreads, plan.shared_bytes, stream>>>(op, plan);
    check_launch(kOp);
}

template <typename T>
void launch_up(const ResampledConv& op, cudaStream_t stream) {
    if (op.in_channels > kInChannels || op.in_channels % 16) fail(kOp, "channels that no kernel exists for");
    if (op.in_channels == 64) return launch_up<T, 4, 3>(op, stream);
    if (op.in_channels % 32 == 0) return launch_up<T, 2, 3>(op, stream);
    return launch_up<T, 1, 4>(op, stream);
}

}  // namespace resampled

void resampled_conv_up(const ResampledConv& op, cudaStream_t stream) {
    if (op.dtype == Dtype::bfloat16) return resampled::launch_up<Bfloat>(op, stream);
    if (op.dtype == Dtype::float16) return resampled::launch_up<Half>(op, stream);
    fail(resampled::kOp, "half precision only");
}

}  // namespace clone_fast

// A 1x1 convolution of an image with what follows it, and its result at half the size, in one pass: where a
// discriminator begins.
#include "_upfirdn2d_branch.cuh"

namespace clone_fast {
namespace {

constexpr int kWaves = 4;  // blocks, in times of what the machine holds at once

template <typename T, int kInputs>
fir::Grid cut(const Upfirdn2d& a) {
    const int vectors = fir::vectors_of<T>(a.c), splits = a.c / kLanes<T> / vectors;
    fir::Grid g = {};
    g.c = a.c, g.h = a.h, g.w = a.w, g.oh = a.oh, g.ow = a.ow, g.gain = a.gain, g.flip = a.flip;
    g.separable = a.separable;
    // one group of threads more than columns of output in a strip, one pair of rows more than rows in a band
    g.columns = ceil_div(a.ow, ceil_div(a.ow, fir::kThreads / vectors - 1));
    g.lanes = Divider((g.columns + 1) * vectors), g.vectors = Divider(vectors);
    const int strips = ceil_div(a.ow, g.columns), per_block = fir::kThreads / static_cast<int>(g.lanes.divisor);
    const std::int64_t pieces = static_cast<std::int64_t>(strips) * splits * a.n;
    const std::int64_t wanted = per_block * fir::blocks_wanted(fir::branch_kernel<T, kInputs>, 0, 100 * kWaves);
    g.rows = ceil_div(a.oh, static_cast<int>(std::clamp<std::int64_t>(wanted / pieces, 1, std::max(1, a.oh / 16)))) | 1;
    const int bands = ceil_div(a.oh, g.rows);
    g.pieces = static_cast<int>(pieces * bands);
    g.splits = Divider(splits), g.strips = Divider(strips), g.bands = Divider(bands);
    return g;
}

template <typename T, int kInputs>
void run_branch(const float* f, const Upfirdn2d& a, const fir::Branching<T>& all, cudaStream_t stream) {
    const fir::Grid g = cut<T, kInputs>(a);
    launch_early(fir::kOp, fir::branch_kernel<T, kInputs>, fir::blocks_of(g), fir::kThreads, 0, stream, f, g, all);
}

}  // namespace

void upfirdn2d_branch(Dtype dtype, const void* x, const float* f, void* y, const Upfirdn2d& a,
                      const Upfirdn2dBranch& branch, cudaStream_t stream) {
    fir::check_sizes(a);
    if (a.fh != 4 || a.fw != 4 || a.up_x != 1 || a.up_y != 1 || a.down_x != 2 || a.down_y != 2 || a.pad_x != 1 ||
        a.pad_y != 1 || a.h != 2 * a.oh || a.w != 2 * a.ow)
        fail(fir::kOp, "a branch wants a 4x4 filter to half the size, with padding 1 before the image");
    if (branch.gain <= 0 || branch.slope > 1) fail(fir::kOp, "a branch wants a positive gain and a slope of at most 1");
    with_dtype(dtype, fir::kOp, [&](auto tag) {
        using T = typename decltype(tag)::type;
        if (!a.channels_last || a.c % kLanes<T> || !is_aligned(y) || !is_aligned(branch.shrunk))
            fail(fir::kOp, "a branch wants channels in vectors of 16 bytes");
        const fir::Branching<T> all{static_cast<const T*>(x),
                                    static_cast<const T*>(branch.weight),
                                    branch.bias,
                                    static_cast<T*>(y),
                                    static_cast<T*>(branch.shrunk),
                                    branch.weight_o,
                                    branch.weight_i,
                                    branch.bias_float,
                                    branch.gain,
                                    branch.slope,
                                    branch.clamp};
        switch (branch.inputs) {
            case 1: return run_branch<T, 1>(f, a, all, stream);
            case 2: return run_branch<T, 2>(f, a, all, stream);
            case 3: return run_branch<T, 3>(f, a, all, stream);
            case 4: return run_branch<T, 4>(f, a, all, stream);
        }
        fail(fir::kOp, "a branch wants 1 to 4 channels of x, got " + std::to_string(branch.inputs));
    });
}

}  // namespace clone_fast

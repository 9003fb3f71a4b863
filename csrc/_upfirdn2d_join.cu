// The 4x4 filter of upfirdn2d that doubles an image, and behind it the way back through an activation and a 1x1
// convolution of few inputs: where a discriminator begins.
#include "_upfirdn2d_join.cuh"

namespace clone_fast {
namespace {

template <typename T, int kInputs>
struct Join {
    using Number = T;
    static constexpr auto kernel = fir::join_kernel<T, kInputs>;
    using Windows = fir::Joined<T, kInputs>;

    // A block slides over the rows of its band and one more, two at a time.
    static fir::Grid cut(const Upfirdn2d& a) {
        fir::Grid g = fir::cut<2, 1, Windows>(kernel, a, 1, a.c / kLanes<T>);
        g.rows = ceil_div(g.rows + 1, 2) * 2 - 1;
        const int bands = ceil_div(ceil_div(a.oh - g.start_y, 2), g.rows);
        g.pieces = g.pieces / static_cast<int>(g.bands.divisor) * bands, g.bands = Divider(bands);
        return g;
    }
};

template <typename Function>
void with_join(Dtype dtype, const Upfirdn2d& a, int inputs, Function&& function) {
    fir::check_sizes(a);
    if (a.fh != 4 || a.fw != 4 || a.up_x != 2 || a.up_y != 2 || a.down_x != 1 || a.down_y != 1)
        fail(fir::kOp, "a branch wants a 4x4 filter, up 2 and down 1");
    if (!a.channels_last || (a.c != 8 && a.c != 16 && a.c != 32 && a.c != 64))
        fail(fir::kOp, "a branch wants 8, 16, 32 or 64 channels in channels_last");  // a pixel's threads are in one warp
    with_dtype(dtype, fir::kOp, [&](auto tag) {
        using T = typename decltype(tag)::type;
        switch (inputs) {
            case 1: return function(Join<T, 1>{});
            case 2: return function(Join<T, 2>{});
            case 3: return function(Join<T, 3>{});
            case 4: return function(Join<T, 4>{});
        }
        fail(fir::kOp, "a branch wants 1 to 4 inputs, not " + std::to_string(inputs));
    });
}

}  // namespace

void upfirdn2d_join(Dtype dtype, const void* x, const float* f, const Upfirdn2d& a, const Upfirdn2dJoin& join,
                    cudaStream_t stream) {
    with_join(dtype, a, join.inputs, [&](auto which) {
        using This = decltype(which);
        using T = typename This::Number;
        const fir::Joining<T> joining{static_cast<const T*>(join.other),
                                      static_cast<const T*>(join.result),
                                      join.gain,
                                      join.slope,
                                      join.limit,
                                      static_cast<const T*>(join.input),
                                      static_cast<const T*>(join.weight),
                                      join.weight_o,
                                      join.weight_i,
                                      static_cast<T*>(join.of_input),
                                      join.of_weight,
                                      join.of_bias};
        const fir::Grid g = This::cut(a);
        launch_early(fir::kOp, This::kernel, fir::blocks_of(g), fir::kThreads, This::Windows::shared_bytes(g), stream,
                     static_cast<const T*>(x), f, g, joining);
    });
}

int upfirdn2d_join_sums(Dtype dtype, const Upfirdn2d& a, int inputs) {
    int found = 0;
    with_join(dtype, a, inputs, [&](auto which) {
        const fir::Grid g = decltype(which)::cut(a);
        found = static_cast<int>(g.strips.divisor * g.bands.divisor);
    });
    return found;
}

}  // namespace clone_fast

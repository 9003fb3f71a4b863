// The 4x4 filter of upfirdn2d, and behind it the gradient of an activation: with both ends the way back through a
// convolution to half the resolution, to the one before it.
#include "_upfirdn2d_slope.cuh"

namespace clone_fast {
namespace {

template <typename T>
struct Slope {
    using Number = T;
    static constexpr auto kernel = fir::slope_kernel<T>;
    using Windows = fir::Sloped<T>;

    static fir::Grid cut(const Upfirdn2d& a) { return fir::cut_in_fours<T, Windows>(kernel, a); }
};

template <typename Function>
void with_slope(Dtype dtype, const Upfirdn2d& a, Function&& function) {
    fir::check_sizes(a);
    if (a.fh != 4 || a.fw != 4 || a.up_x != 1 || a.up_y != 1 || a.down_x != 1 || a.down_y != 1)
        fail(fir::kOp, "an activation's slopes want a 4x4 filter without resampling");
    with_dtype(dtype, fir::kOp, [&](auto tag) {
        using T = typename decltype(tag)::type;
        if (!a.channels_last || a.c % kLanes<T>)
            fail(fir::kOp, "an activation's slopes want channels in vectors of 16 bytes");
        function(Slope<T>{});
    });
}

}  // namespace

void upfirdn2d_slope(Dtype dtype, const void* x, const float* f, void* y, const Upfirdn2d& a,
                     const Upfirdn2dSlope& slope, cudaStream_t stream) {
    with_slope(dtype, a, [&](auto which) {
        using This = decltype(which);
        using T = typename This::Number;
        const fir::Sloping<T> sloping{static_cast<const T*>(slope.result), static_cast<const T*>(y), slope.gain,
                                      slope.gain * slope.slope, slope.limit, slope.of_bias};
        const fir::Grid g = This::cut(a);
        launch_early(fir::kOp, This::kernel, fir::blocks_of(g), fir::kThreads, This::Windows::shared_bytes(g), stream,
                     static_cast<const T*>(x), f, static_cast<T*>(y), g, sloping);
    });
}

int upfirdn2d_slope_sums(Dtype dtype, const Upfirdn2d& a) {
    int found = 0;
    with_slope(dtype, a, [&](auto which) {
        const fir::Grid g = decltype(which)::cut(a);
        found = static_cast<int>(g.strips.divisor * g.bands.divisor);
    });
    return found;
}

}  // namespace clone_fast

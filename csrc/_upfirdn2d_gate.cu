// The 4x4 filter of upfirdn2d behind the gradient of an activation: with both begins the gradient of an upsampling
// convolution.
#include "_upfirdn2d_gate.cuh"

namespace clone_fast {
namespace {

template <typename T, bool kNoise, bool kDots>
struct Gate {
    using Number = T;
    static constexpr auto kernel = fir::gate_kernel<T, kNoise, kDots>;
    using Windows = fir::Gated<T, kNoise, kDots>;

    static fir::Grid cut(const Upfirdn2d& a) { return fir::cut_in_fours<T, Windows>(kernel, a); }
};

template <typename Function>
void with_gate(Dtype dtype, const Upfirdn2d& a, bool noise, bool dots, Function&& function) {
    fir::check_sizes(a);
    // so that every pixel is below some output, and in a window onto it
    if (a.fh != 4 || a.fw != 4 || a.up_x != 1 || a.up_y != 1 || a.down_x != 1 || a.down_y != 1 || a.pad_x < 0 ||
        a.pad_y < 0 || a.pad_x > 3 || a.pad_y > 3 || a.oh < a.h || a.ow < a.w)
        fail(fir::kOp, "gating wants a 4x4 filter without resampling that makes the image no smaller");
    with_dtype(dtype, fir::kOp, [&](auto tag) {
        using T = typename decltype(tag)::type;
        if (!a.channels_last || a.c % kLanes<T>) fail(fir::kOp, "gating wants channels in vectors of 16 bytes");
        with_flag(noise, [&](auto noise_flag) {
            with_flag(dots, [&](auto dots_flag) {
                function(Gate<T, decltype(noise_flag)::value, decltype(dots_flag)::value>{});
            });
        });
    });
}

}  // namespace

void upfirdn2d_gate(Dtype dtype, const void* x, const float* f, void* y, const Upfirdn2d& a, const Upfirdn2dGate& gate,
                    cudaStream_t stream) {
    with_gate(dtype, a, gate.noise != nullptr, gate.of_dots != nullptr, [&](auto which) {
        using This = decltype(which);
        using T = typename This::Number;
        const fir::Gating<T> gating{static_cast<const T*>(gate.result),
                                    static_cast<const T*>(gate.noise),
                                    static_cast<const T*>(gate.strength),
                                    static_cast<const T*>(gate.bias),
                                    gate.noise_stride,
                                    gate.gain,
                                    gate.gain * gate.slope,
                                    gate.limit,
                                    gate.of_bias,
                                    gate.of_dots,
                                    gate.of_strength};
        const fir::Grid g = This::cut(a);
        launch_early(fir::kOp, This::kernel, fir::blocks_of(g), fir::kThreads, This::Windows::shared_bytes(g), stream,
                     static_cast<const T*>(x), f, static_cast<T*>(y), g, gating);
    });
}

std::pair<int, int> upfirdn2d_gate_sums(Dtype dtype, const Upfirdn2d& a, bool noise, bool dots) {
    std::pair<int, int> found;
    with_gate(dtype, a, noise, dots, [&](auto which) {
        const fir::Grid g = decltype(which)::cut(a);
        found = {static_cast<int>(g.strips.divisor * g.bands.divisor), fir::blocks_of(g)};
    });
    return found;
}

}  // namespace clone_fast

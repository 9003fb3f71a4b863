// The 4x4 filter of upfirdn2d with what follows a convolution: the second pass of an upsampling one.
#include "_upfirdn2d_finish.cuh"

namespace clone_fast {
namespace {

template <typename T, bool kNoise>
void run_finish(const T* x, const float* f, T* y, Upfirdn2d a, const fir::Finishing<T>& finish, cudaStream_t stream) {
    using Vectors = fir::Finished<fir::Vectors<T, 1, 1, true, false>, T, kNoise>;
    using Elements = fir::Finished<fir::Elements<T, 1, 1>, T, kNoise>;
    if (a.channels_last && a.c % kLanes<T> == 0 && is_aligned(x) && is_aligned(y)) {
        const int vectors = fir::vectors_of<T>(a.c);
        return fir::launch_fir4<T, 1, 1, Vectors>(x, f, y, a, a.c / kLanes<T> / vectors, vectors, stream, finish);
    }
    fir::launch_fir4<T, 1, 1, Elements>(x, f, y, a, 1, a.channels_last ? a.c : 1, stream, finish);
}

}  // namespace

void upfirdn2d_finish(Dtype dtype, const void* x, const float* f, void* y, Upfirdn2d a, const Upfirdn2dFinish& finish,
                      cudaStream_t stream) {
    if (a.fh != 4 || a.fw != 4 || a.up_x != 1 || a.up_y != 1 || a.down_x != 1 || a.down_y != 1 || finish.gain <= 0 ||
        finish.slope > 1)
        fail(fir::kOp, "finishing wants a 4x4 filter without resampling, a positive gain and a slope of at most 1");
    a.gain *= finish.gain;
    with_dtype(dtype, fir::kOp, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const fir::Finishing<T> all{static_cast<const T*>(finish.noise), static_cast<const T*>(finish.strength),
                                    static_cast<const T*>(finish.bias), finish.noise_stride,
                                    a.channels_last ? 1 : a.c, finish.gain, finish.slope, finish.clamp};
        with_flag(finish.noise != nullptr, [&](auto noise) {
            run_finish<T, decltype(noise)::value>(static_cast<const T*>(x), f, static_cast<T*>(y), a, all, stream);
        });
    });
}

}  // namespace clone_fast

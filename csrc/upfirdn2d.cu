// upfirdn2d: the launcher, and the kernel for whatever the fast ones of _upfirdn2d_fir4.cuh leave.
#include "upfirdn2d.h"

#include "_upfirdn2d_beside.cuh"
#include "_upfirdn2d_launch.cuh"

namespace clone_fast {
namespace {

using fir::kOp;

constexpr int kGeneralThreads = 256;

// By windows of which most lies beside, if the image allows that.
template <typename T, int kDown, int kLeft>
bool run_beside(const T* x, const float* f, T* y, const Upfirdn2d& a, cudaStream_t stream) {
    using Windows = fir::Beside<T, kDown, kLeft>;
    if (a.pad_x != kLeft || !Windows::has_neighbours(fir::columns_of(ceil_div(a.ow, Windows::kOut), 1))) return false;
    fir::launch_fir4<T, 1, kDown, Windows>(x, f, y, a, 1, 1, stream);
    return true;
}

template <typename T, int kUp, int kDown>
void run_fir4(const T* x, const float* f, T* y, const Upfirdn2d& a, cudaStream_t stream) {
    const bool aligned = is_aligned(x) && is_aligned(y);
    if (a.channels_last && a.c % kLanes<T> == 0 && aligned) {
        const int vectors = fir::vectors_of<T>(a.c);
        return fir::launch_fir4<T, kUp, kDown, fir::Vectors<T, kUp, kDown, true, false>>(
            x, f, y, a, a.c / kLanes<T> / vectors, vectors, stream);
    }
    if (!a.channels_last && a.w % kLanes<T> == 0 && a.ow % kLanes<T> == 0 && aligned) {
        constexpr bool same = kUp == 1 && kDown == 1 && sizeof(T) == 2;  // in float32 Vectors are faster
        if constexpr (same || kDown == 2)
            if (run_beside<T, kDown, 1>(x, f, y, a, stream)) return;
        if constexpr (same)
            if (run_beside<T, kDown, 2>(x, f, y, a, stream)) return;
        if constexpr (kUp == 2)
            if (a.pad_x % 2 == 0)
                return fir::launch_fir4<T, kUp, kDown, fir::Vectors<T, kUp, kDown, false, true>>(x, f, y, a, 1, 1,
                                                                                                 stream);
        return fir::launch_fir4<T, kUp, kDown, fir::Vectors<T, kUp, kDown, false, false>>(x, f, y, a, 1, 1, stream);
    }
    fir::launch_fir4<T, kUp, kDown, fir::Elements<T, kUp, kDown>>(x, f, y, a, 1, a.channels_last ? a.c : 1, stream);
}

// Everything else, one thread for each output: only taps that meet a sample of the image are visited.
template <typename In, typename Out>
__global__ void __launch_bounds__(kGeneralThreads)
    general_kernel(const In* __restrict__ x, const float* __restrict__ f, Out* __restrict__ y,
                   const __grid_constant__ Upfirdn2d a, Divider channels, Divider columns, Divider rows,
                   std::uint32_t outputs) {
    const std::uint32_t index = blockIdx.x * kGeneralThreads + threadIdx.x;
    if (index >= outputs) return;
    std::uint32_t channel, ox, oy;  // channel: among those that lie beside each other, else 0
    const std::uint32_t image = rows.divide(columns.divide(channels.divide(index, channel), ox), oy);
    const int c = channels.divisor;
    const int top = static_cast<int>(oy) * a.down_y - a.pad_y, left = static_cast<int>(ox) * a.down_x - a.pad_x;
    const int y0 = max(0, ceil_div(top, a.up_y)), x0 = max(0, ceil_div(left, a.up_x));
    const int bottom = top + a.fh - 1, right = left + a.fw - 1;
    const int y1 = bottom < 0 ? -1 : min(a.h - 1, bottom / a.up_y), x1 = right < 0 ? -1 : min(a.w - 1, right / a.up_x);
    const In* from = x + static_cast<std::int64_t>(image) * a.h * a.w * c + channel;
    float sum = 0.0f;
    for (int iy = y0; iy <= y1; ++iy) {
        const int ky = iy * a.up_y - top, fy = a.flip ? ky : a.fh - 1 - ky;
        const float* taps = a.separable ? f : f + fy * a.fw;
        float across = 0.0f;
        for (int ix = x0; ix <= x1; ++ix) {
            const int kx = ix * a.up_x - left, fx = a.flip ? kx : a.fw - 1 - kx;
            across = fmaf(__ldg(taps + fx), to_float(from[(static_cast<std::int64_t>(iy) * a.w + ix) * c]), across);
        }
        sum = fmaf(a.separable ? __ldg(f + fy) : 1.0f, across, sum);
    }
    y[index] = from_float<Out>(a.gain * sum);
}

template <typename In, typename Out>
void run_general(const In* x, const float* f, Out* y, const Upfirdn2d& a, cudaStream_t stream) {
    const std::int64_t outputs = static_cast<std::int64_t>(a.n) * a.c * a.oh * a.ow;
    const auto blocks = static_cast<unsigned>(ceil_div<std::int64_t>(outputs, kGeneralThreads));
    general_kernel<<<blocks, kGeneralThreads, 0, stream>>>(
        x, f, y, a, Divider(a.channels_last ? a.c : 1), Divider(a.ow), Divider(a.oh),
        static_cast<std::uint32_t>(outputs));
    check_launch(kOp);
}

}  // namespace

void upfirdn2d(Dtype x_dtype, const void* x, const float* f, Dtype y_dtype, void* y, const Upfirdn2d& a,
               cudaStream_t stream) {
    fir::check_sizes(a);
    if (x_dtype != y_dtype) {
        if (x_dtype == Dtype::float32)
            return with_dtype(y_dtype, kOp, [&](auto tag) {
                using T = typename decltype(tag)::type;
                run_general(static_cast<const float*>(x), f, static_cast<T*>(y), a, stream);
            });
        if (y_dtype != Dtype::float32) fail(kOp, "x and y must have the same dtype, or one of them float32");
        return with_dtype(x_dtype, kOp, [&](auto tag) {
            using T = typename decltype(tag)::type;
            run_general(static_cast<const T*>(x), f, static_cast<float*>(y), a, stream);
        });
    }
    with_dtype(x_dtype, kOp, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const auto* from = static_cast<const T*>(x);
        auto* to = static_cast<T*>(y);
        const bool same_up = a.up_x == a.up_y, same_down = a.down_x == a.down_y;
        if (a.fh == 4 && a.fw == 4 && same_up && same_down) {
            if (a.up_x == 1 && a.down_x == 1) return run_fir4<T, 1, 1>(from, f, to, a, stream);
            if (a.up_x == 2 && a.down_x == 1) return run_fir4<T, 2, 1>(from, f, to, a, stream);
            if (a.up_x == 1 && a.down_x == 2) return run_fir4<T, 1, 2>(from, f, to, a, stream);
        }
        run_general(from, f, to, a, stream);
    });
}

}  // namespace clone_fast

// upfirdn2d: the launcher, and the kernel for whatever the fast ones of _upfirdn2d_fir4.cuh leave.
#include "upfirdn2d.h"

#include <algorithm>

#include "_upfirdn2d_fir4.cuh"

namespace clone_fast {
namespace {

constexpr const char* kOp = "upfirdn2d";
constexpr int kGeneralThreads = 256;

// How many blocks to make of a tensor, in percent of what the machine holds at once. Few have long bands and read
// little twice; many leave no multiprocessor waiting for the last one. Measured on an H200, tensors of 16 to 512 MB.
template <int kUp, int kDown, class Windows>
constexpr int kPercent = kUp == 2 ? 400 : kDown == 2 ? 50 : Windows::kValues == 1 ? 200 : 50;

template <typename Kernel>
std::int64_t blocks_wanted(Kernel* kernel, int shared_bytes, int percent) {
    int blocks = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, fir::kThreads, shared_bytes), kOp);
    return std::int64_t{percent} * std::max(1, blocks) * multiprocessors(kOp) / 100;
}

template <typename T, int kUp, int kDown, class Windows>
void launch_fir4(const T* x, const float* f, T* y, const Upfirdn2d& a, int splits, int vectors, cudaStream_t stream) {
    const auto kernel = fir::fir4_kernel<T, kUp, kDown, Windows>;
    const int images = a.channels_last ? a.n : a.n * a.c;
    fir::Grid g;
    g.c = a.channels_last ? a.c : 1, g.h = a.h, g.w = a.w, g.oh = a.oh, g.ow = a.ow;
    g.start_x = kUp == 2 && a.pad_x % 2 == 0 && !Windows::kEven ? -1 : 0;
    g.start_y = kUp == 2 && a.pad_y % 2 == 0 ? -1 : 0;
    g.first_x = kUp == 2 ? (g.start_x + !Windows::kEven - a.pad_x) / 2 : -a.pad_x;  // without a rest
    g.first_y = kUp == 2 ? (g.start_y + 1 - a.pad_y) / 2 : -a.pad_y;
    g.gain = a.gain, g.flip = a.flip, g.separable = a.separable;

    const int groups = ceil_div(a.ow - g.start_x, Windows::kOut);  // of columns
    int strips;
    if (Windows::kValues == 1 && a.channels_last) {  // Elements, which take columns and channels in one
        const int lanes = std::min(fir::kThreads, groups * vectors);
        strips = ceil_div(groups * vectors, lanes), g.columns = 0, g.lanes = Divider(lanes);
    } else {  // strips of the same width, and at least as wide as Vectors::kCopies wants
        strips = ceil_div(groups, std::min(fir::kThreads / vectors, std::max(4, groups)));
        g.columns = std::max(4, ceil_div(groups, strips));
        g.lanes = Divider(g.columns * vectors);
    }
    g.vectors = Divider(vectors);
    g.chunks = Windows::chunks(g.columns, vectors);
    const int shared_bytes = Windows::shared_bytes(g), per_block = fir::kThreads / static_cast<int>(g.lanes.divisor);
    if (shared_bytes > 48 * 1024) allow_shared_memory(kernel, shared_bytes, kOp);

    const int total = kUp == 2 ? ceil_div(a.oh - g.start_y, 2) : a.oh;
    const std::int64_t pieces = static_cast<std::int64_t>(strips) * splits * images;
    const std::int64_t wanted = per_block * blocks_wanted(kernel, shared_bytes, kPercent<kUp, kDown, Windows>);
    g.rows = ceil_div(total, static_cast<int>(std::clamp<std::int64_t>(wanted / pieces, 1, std::max(1, total / 8))));
    const int bands = ceil_div(total, g.rows);
    g.pieces = static_cast<int>(pieces * bands);
    g.splits = Divider(splits), g.strips = Divider(strips), g.bands = Divider(bands);
    kernel<<<ceil_div(g.pieces, per_block), fir::kThreads, shared_bytes, stream>>>(x, f, y, g);
    check_launch(kOp);
}

template <typename T, int kUp, int kDown>
void run_fir4(const T* x, const float* f, T* y, const Upfirdn2d& a, cudaStream_t stream) {
    const bool aligned = is_aligned(x) && is_aligned(y);
    if (a.channels_last && a.c % kLanes<T> == 0 && aligned) {
        int vectors = std::min(8, a.c / kLanes<T>);
        while (a.c / kLanes<T> % vectors) --vectors;
        return launch_fir4<T, kUp, kDown, fir::Vectors<T, kUp, kDown, true, false>>(
            x, f, y, a, a.c / kLanes<T> / vectors, vectors, stream);
    }
    if (!a.channels_last && a.w % kLanes<T> == 0 && a.ow % kLanes<T> == 0 && aligned) {
        if constexpr (kUp == 2)
            if (a.pad_x % 2 == 0)
                return launch_fir4<T, kUp, kDown, fir::Vectors<T, kUp, kDown, false, true>>(x, f, y, a, 1, 1, stream);
        return launch_fir4<T, kUp, kDown, fir::Vectors<T, kUp, kDown, false, false>>(x, f, y, a, 1, 1, stream);
    }
    launch_fir4<T, kUp, kDown, fir::Elements<T, kUp, kDown>>(x, f, y, a, 1, a.channels_last ? a.c : 1, stream);
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
    const std::int64_t most = std::int64_t{1} << 31, planes = static_cast<std::int64_t>(a.n) * a.c;
    if (a.n < 1 || a.c < 1 || a.h < 1 || a.w < 1 || a.oh < 1 || a.ow < 1 || a.fh < 1 || a.fw < 1 || a.up_x < 1 ||
        a.up_y < 1 || a.down_x < 1 || a.down_y < 1 || planes * a.h * a.w >= most || planes * a.oh * a.ow >= most)
        fail(kOp, "sizes and factors must be positive, x and y below 2^31 elements");
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

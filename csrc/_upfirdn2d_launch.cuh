// How upfirdn2d's fast kernels are launched: how an image is cut up, and into how many blocks.
#pragma once

#include <algorithm>

#include "_upfirdn2d_fir4.cuh"
#include "upfirdn2d.h"

namespace clone_fast::fir {

inline constexpr const char* kOp = "upfirdn2d";

// Indices are 32 bits wide.
inline void check_sizes(const Upfirdn2d& a) {
    const std::int64_t most = std::int64_t{1} << 31, planes = static_cast<std::int64_t>(a.n) * a.c;
    if (a.n < 1 || a.c < 1 || a.h < 1 || a.w < 1 || a.oh < 1 || a.ow < 1 || a.fh < 1 || a.fw < 1 || a.up_x < 1 ||
        a.up_y < 1 || a.down_x < 1 || a.down_y < 1 || planes * a.h * a.w >= most || planes * a.oh * a.ow >= most)
        fail(kOp, "sizes and factors must be positive, x and y below 2^31 elements");
}

// How many blocks to make of a tensor, in percent of what the machine holds at once. Few have long bands and read
// little twice; many leave no multiprocessor waiting for the last one. Measured on an H200, tensors of 16 to 512 MB.
template <int kUp, int kDown, class Windows>
constexpr int kPercent = kUp == 2                ? 400
                         : Windows::kBeside      ? 100
                         : kDown == 2            ? (Windows::kValues == 1 ? 50 : 100)
                         : Windows::kValues == 1 ? 200
                         : Windows::kFinishes    ? 100
                                                 : 50;

template <typename Kernel>
std::int64_t blocks_wanted(Kernel* kernel, int shared_bytes, int percent) {
    int blocks = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, shared_bytes), kOp);
    return std::int64_t{percent} * std::max(1, blocks) * multiprocessors(kOp) / 100;
}

// Into how many bands to cut pieces as high as an image, which is `most` at the most: as many as give the blocks wanted.
// Where these would leave a tenth of the multiprocessors' turns empty, as few more as would not, if the machine can hold
// them all at once: ten images of 17 strips are 170 blocks, of which 38 of 132 multiprocessors would get two.
inline int bands_of(std::int64_t pieces, int per_block, std::int64_t wanted, std::int64_t held, int most) {
    const std::int64_t processors = multiprocessors(kOp);
    const auto blocks = [&](int bands) { return (pieces * bands + per_block - 1) / per_block; };
    const auto is_even = [&](int bands) {
        const std::int64_t turns = (blocks(bands) + processors - 1) / processors;
        return 10 * blocks(bands) >= 9 * turns * processors;
    };
    const int first = static_cast<int>(std::clamp<std::int64_t>(wanted * per_block / pieces, 1, most));
    for (int bands = first; bands <= most && blocks(bands) <= held; ++bands) {
        if (is_even(bands)) return bands;
    }
    return first;
}

// Groups of columns in a strip: strips of the same width, and at least as wide as Vectors::kCopies wants.
inline int columns_of(int groups, int vectors) {
    const int strips = ceil_div(groups, std::min(kThreads / vectors, std::max(4, groups)));
    return std::max(4, ceil_div(groups, strips));
}

// How an image is cut up for a kernel of these windows.
template <int kUp, int kDown, class Windows, typename Kernel>
Grid cut(Kernel* kernel, const Upfirdn2d& a, int splits, int vectors, int percent = kPercent<kUp, kDown, Windows>) {
    const int images = a.channels_last ? a.n : a.n * a.c;
    Grid g;
    g.c = a.channels_last ? a.c : 1, g.h = a.h, g.w = a.w, g.oh = a.oh, g.ow = a.ow;
    g.start_x = kUp == 2 && a.pad_x % 2 == 0 && !Windows::kEven ? -1 : 0;
    g.start_y = kUp == 2 && a.pad_y % 2 == 0 ? -1 : 0;
    g.first_x = kUp == 2 ? (g.start_x + !Windows::kEven - a.pad_x) / 2 : -a.pad_x;  // without a rest
    g.first_y = kUp == 2 ? (g.start_y + 1 - a.pad_y) / 2 : -a.pad_y;
    g.gain = a.gain, g.flip = a.flip, g.separable = a.separable;

    const int groups = ceil_div(a.ow - g.start_x, Windows::kOut);  // of columns
    int strips;
    if (Windows::kValues == 1 && a.channels_last) {  // Elements, which take columns and channels in one
        const int lanes = std::min(kThreads, groups * vectors);
        strips = ceil_div(groups * vectors, lanes), g.columns = 0, g.lanes = Divider(lanes);
    } else {
        g.columns = columns_of(groups, vectors), strips = ceil_div(groups, g.columns);
        g.lanes = Divider(g.columns * vectors);
    }
    g.vectors = Divider(vectors);
    g.chunks = Windows::chunks(g.columns, vectors);
    const int shared_bytes = Windows::shared_bytes(g), per_block = kThreads / static_cast<int>(g.lanes.divisor);
    if (shared_bytes > 48 * 1024) allow_shared_memory(kernel, shared_bytes, kOp);

    const int total = kUp == 2 ? ceil_div(a.oh - g.start_y, 2) : a.oh;
    const std::int64_t pieces = static_cast<std::int64_t>(strips) * splits * images;
    const std::int64_t held = blocks_wanted(kernel, shared_bytes, 100), wanted = held * percent / 100;
    g.rows = ceil_div(total, bands_of(pieces, per_block, wanted, held, std::max(1, total / 8)));
    const int bands = ceil_div(total, g.rows);
    g.pieces = static_cast<int>(pieces * bands);
    g.splits = Divider(splits), g.strips = Divider(strips), g.bands = Divider(bands);
    return g;
}

inline int blocks_of(const Grid& g) { return ceil_div(g.pieces, kThreads / static_cast<int>(g.lanes.divisor)); }

template <typename T, int kUp, int kDown, class Windows>
void launch_fir4(const T* x, const float* f, T* y, const Upfirdn2d& a, int splits, int vectors, cudaStream_t stream,
                 const typename Windows::Finish& finish = {}) {
    const auto kernel = fir4_kernel<T, kUp, kDown, Windows>;
    const Grid g = cut<kUp, kDown, Windows>(kernel, a, splits, vectors);
    kernel<<<blocks_of(g), kThreads, Windows::shared_bytes(g), stream>>>(x, f, y, g, finish);
    check_launch(kOp);
}

// The vectors of channels in a split: at most 8, and as many in each.
template <typename T>
int vectors_of(int channels) {
    int vectors = std::min(8, channels / kLanes<T>);
    while (channels / kLanes<T> % vectors) --vectors;
    return vectors;
}

}  // namespace clone_fast::fir

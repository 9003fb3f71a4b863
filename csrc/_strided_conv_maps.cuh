// What the copies of the strided convolution are told of images and weights.
#pragma once

#include "_tma.cuh"

namespace clone_fast::strided {

// Channels_last and dense.
struct Images {
    const void* from;
    int n, height, width, channels;
};

// Every `step`-th row and column from (y, z) on.
template <typename T>
CUtensorMap every_map(const Images& of, int y, int z, int step, int channels, int rows, int columns) {
    const std::int64_t line = static_cast<std::int64_t>(of.width) * of.channels;
    const auto count = [&](int size, int start) { return (size - start + step - 1) / step; };
    return tensor_map<T, 4>(static_cast<const T*>(of.from) + y * line + static_cast<std::int64_t>(z) * of.channels,
                            {of.channels, count(of.width, z), count(of.height, y), of.n},
                            {static_cast<std::int64_t>(step) * of.channels, step * line, line * of.height},
                            {channels, columns, rows, 1});
}

// Of weights [taps, O, I], `out_channels` rows of one tap at a time. Of every 8 columns of a product, 8 b + 2 q + e, a
// thread holds two: let these be channels 8 q + 2 b + e, so that it holds 8 that lie together.
template <typename T>
CUtensorMap weight_map(const void* from, int taps, int all_out_channels, int in_channels, int channels,
                       int out_channels) {
    const std::int64_t row = in_channels;
    return tensor_map<T, 5>(from, {in_channels, 2, 4, 4, taps * (all_out_channels / 32)},
                            {row, 8 * row, 2 * row, 32 * row}, {channels, 2, 4, 4, out_channels / 32});
}

}  // namespace clone_fast::strided

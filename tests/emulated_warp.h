// As much of csrc/_modulated_conv2d_load.cuh as _modulated_conv2d_drawing.cuh asks for, on a CPU: mma.sync as the PTX
// ISA lays its operands out over the lanes of a warp.
#pragma once

#include <bit>

#include "launch.cuh"
#include "modulated_conv2d.h"

namespace clone_fast {

template <typename T>
std::uint32_t limited_pair(std::uint32_t pair, std::uint32_t low, std::uint32_t high) {
    const auto half = [](std::uint32_t word, int i) { return std::bit_cast<float>(word >> 16 * i << 16); };
    const auto limited = [&](int i) { return std::clamp(half(pair, i), half(low, i), half(high, i)); };
    return pack_pair<T>(limited(0), limited(1));
}

namespace conv3x3 {

constexpr int kThreads = 256;

template <typename T>
float load_number(const void* from, std::int64_t index, bool is_float) {
    return is_float ? static_cast<const float*>(from)[index] : to_float(static_cast<const T*>(from)[index]);
}

inline std::uint32_t operands[kThreads][6];

// [16, 16] times [16, 8]. Lane 4g + q holds rows g and g + 8 of the left operand, column g of the right one, of both
// terms 2q, 2q + 1, 2q + 8 and 2q + 9; and rows g and g + 8, columns 2q and 2q + 1 of the sums.
template <typename T>
void multiply_add(float (&sums)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    const int lane = threadIdx.x % 32, first = threadIdx.x - lane;
    const std::uint32_t own[6] = {a[0], a[1], a[2], a[3], b0, b1};
    std::memcpy(operands[threadIdx.x], own, sizeof own);
    warp->arrived.arrive_and_wait();
    const auto number = [&](int row, int word, int k) {
        const std::uint32_t pair = operands[first + row * 4 + k % 8 / 2][word];
        return to_float(T{static_cast<std::uint16_t>(pair >> k % 2 * 16)});
    };
    for (int i = 0; i < 4; ++i) {
        for (int k = 0; k < 16; ++k) {
            sums[i] += number(lane / 4, i / 2 + k / 8 * 2, k) * number(lane % 4 * 2 + i % 2, 4 + k / 8, k);
        }
    }
    warp->arrived.arrive_and_wait();
}

}  // namespace conv3x3
}  // namespace clone_fast

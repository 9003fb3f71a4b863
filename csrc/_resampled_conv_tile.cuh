// How the upsampling convolution is cut into blocks, teams and steps, and where things lie in shared memory.
// See _resampled_conv_up_sm90a.cu.
#pragma once

#include "_resampled_conv.h"
#include "_resampled_conv_ptx.cuh"

namespace clone_fast::resampled {

constexpr char kOp[] = "modulated_conv2d (up)";
constexpr int kUnit = 16;
constexpr int kInChannels = 64;  // at most: with more, the convolution and the filter in two kernels are faster
constexpr int kOut = 32;  // output channels of a block
constexpr int kGrid = 32;  // grid columns of a strip
constexpr int kColumns = 2 * (kGrid - 2);  // output columns of a strip
constexpr int kRows = 4;  // output rows of a step
constexpr int kGroup = 128;  // threads of a warpgroup
constexpr int kTeams = 2;
constexpr int kThreads = 2 * kTeams * kGroup;
constexpr int kWeightGroups = 2;  // the weights arrive in as many portions, so that work begins with the first
constexpr int kInputPixels = 3 * kGrid;
constexpr int kInputPitch = (kInputPixels + 1) * kUnit;  // odd in units: the chunks of a pixel lie in different banks
constexpr int kWeightBlocks = 11;  // of 32 output channels each: the 9 taps, and two blocks of zeros
constexpr int kWeightPitch = (kWeightBlocks * kOut + 1) * kUnit;
constexpr int kPlane = kGrid * kOut * 2;  // bytes of the even or the odd columns of a field row
constexpr int kField = kRows * 2 * kPlane;
constexpr int kFields = 3;  // buffers: two are being filtered, one is being filled

// How a launch is cut up. A segment is what a team does: `steps` steps of a strip, the first of which gives no output.
struct Plan {
    int strips, segments, steps, blocks, weight_bytes, shared_bytes;
    int parts, parts_of_group;  // of the input channels: a part is a stage of the input's ring; groups arrive together
    Divider chunks_of_group;
};

struct Segment {
    int sample, first_channel, x, y;  // of the output
};

// The named barriers of a team.
enum Barrier { kTogether, kFull, kEmpty = kFull + kFields, kBarriers = kEmpty + kFields };
__device__ __forceinline__ int barrier_of(int team, int which) { return team * kBarriers + which; }
constexpr int kWeightBarrier = kTeams * kBarriers;  // and those behind it: a portion of the weights is there
static_assert(kWeightBarrier + kWeightGroups <= 16);

// Of a grid position, for each pair of phases: 8 columns of 8 output channels are 4 of a lane's numbers, and the first
// 16 are those of one phase.
using Sums = float[2][32];

template <typename T>
__device__ __forceinline__ float load_number(const void* from, std::int64_t index, int is_float) {
    return is_float ? static_cast<const float*>(from)[index] : to_float(static_cast<const T*>(from)[index]);
}

// In which block of a chunk a tap's 32 output channels lie. The phases are (even row, even column), (odd, even); (odd,
// odd), (even, odd): an instruction multiplies a pair of them, by two neighbouring blocks. "Taps" 9 and 10 are zeros,
// for shifts that only one phase of a pair takes part in.
__device__ __forceinline__ int block_of_tap(int tap) {  // 0, 3, 4, 1, 2, 5, 6, 8, 9, 7, 10
    return static_cast<int>(0xa7986521430ull >> (4 * tap) & 15);
}

// Where a column's 16-byte unit is in its plane of the field, the plane of the even or of the odd columns. Neither 8
// neighbouring columns of a plane, which are written together, nor 7 of both planes, which are read, share a bank.
__device__ __forceinline__ int field_unit(int column, int unit, bool odd) {
    const int half = (column >> 2 & 1) ^ (odd ? 0 : 1);
    return (column >> 3) * 512 + (column & 3) * 128 + half * 64 + (unit ^ (column & 3)) * kUnit;
}

template <typename T>
__device__ __forceinline__ float2 unpack_pair(std::uint32_t word) {
    if constexpr (std::is_same_v<T, Bfloat>) {
        return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
    } else {
        const __half2_raw raw{static_cast<unsigned short>(word & 0xffffu), static_cast<unsigned short>(word >> 16)};
        return __half22float2(__half2(raw));
    }
}

}  // namespace clone_fast::resampled

// How the downsampling convolution is cut into blocks, teams and steps, and where things lie in shared memory.
// See _resampled_conv_down_sm90a.cu.
#pragma once

#include "_fir4_matrix.cuh"
#include "_resampled_conv_tile.cuh"

namespace clone_fast::resampled::down {

constexpr char kOp[] = "modulated_conv2d (down)";
constexpr int kOut = 64;      // output channels of a block
constexpr int kGrid = 32;     // grid columns of a strip: pairs of columns of the field
constexpr int kColumns = 31;  // output columns of a strip: each needs its right neighbour on the grid
constexpr int kRows = 2;      // output rows of a step
static_assert(2 * kRows == kPatch);  // the rows of the field that a step makes
constexpr int kGroup = 128;  // threads of a warpgroup
constexpr int kBuffers = 2;  // of the field: one is being multiplied, one is being filled

// A chunk of the field, in units: three even rows, then two odd ones, of the even columns; then those of the odd
// columns. The gaps between them let the 4 x 2 pixels that are stored at once lie in different banks.
constexpr int kOddRows = 3 * kGrid + 2, kOddColumns = kOddRows + 2 * kGrid + 2;
constexpr int kFieldChunk = kOddColumns + kOddRows + 2 * kGrid;
static_assert(kOddRows % 8 == 2 && kOddColumns % 8 == 4);
constexpr int kWeightPitch = (9 * kOut + 1) * kUnit;  // odd in units: chunks lie in different banks

// A half is 32 input channels. One warpgroup of a team multiplies, one for each half filters.
template <typename T, int kHalves>
struct Shape {
    static constexpr int kChunks = 4 * kHalves;
    static constexpr int kTeams = 2 / kHalves, kFilters = kHalves, kStages = kHalves == 1 ? 3 : 2;
    static constexpr int kTeamThreads = (1 + kFilters) * kGroup, kThreads = kTeams * kTeamThreads;
    using Ring = Input<T, kChunks, kFilters * kGroup, kStages>;
    static constexpr int kWeightBytes = (kChunks * kWeightPitch + 127) / 128 * 128;
    static constexpr int kField = kChunks * kFieldChunk * kUnit;
    static constexpr int kTeamBytes = kBuffers * kField + kStages * Ring::kStage;
    static constexpr int kSharedBytes = kWeightBytes + kTeams * kTeamBytes;
    static_assert(kSharedBytes <= 227 * 1024 && kField % 128 == 0);
};

// How a launch is cut up. A segment is what a team does: `steps` steps of a strip, the first of which gives no output.
struct Plan {
    int strips, segments, steps, blocks;
};

struct Segment {
    int sample, first_channel, x, y;  // of the output
};

// The named barriers of a team, and one of all who multiply.
enum Barrier { kTogether = 1, kFull, kEmpty = kFull + kBuffers, kBarriers = kEmpty + kBuffers };
__device__ __forceinline__ int barrier_of(int team, int which) { return team * (kBarriers - 1) + which; }
constexpr int kWeightBarrier = 2 * (kBarriers - 1) + 1;
static_assert(kWeightBarrier < 16);

// Where row `row` (0: the one that the step before computed too) of the even or the odd columns begins in a chunk.
__device__ __forceinline__ constexpr int field_row(int row, bool odd_columns) {
    return (odd_columns ? kOddColumns : 0) + (row % 2 ? kOddRows : 0) + row / 2 * kGrid;
}

}  // namespace clone_fast::resampled::down

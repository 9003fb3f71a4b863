// How the strided convolution lies in shared memory and in the tensor cores, as numbers that a host can check.
#pragma once

namespace clone_fast::strided {

constexpr int kSide = 8, kBoxColumns = kSide + 1;  // pixels of a tile's row, and with the column beside it
constexpr int kGroups = 2, kGroupThreads = 128;  // warpgroups that multiply, each a tile of its own
constexpr int kThreads = kGroups * kGroupThreads + kGroups * 32;  // and a warp for each that copies
constexpr int kSharedBytes = 227 << 10;  // that a block may have
constexpr int kMaxChunks = 4, kMaxDepth = 8;

// One product: the input box from (row, column) on by the weights from `slot` on, `count` taps, into as many phases.
struct Tap {
    int row, column, slot, first, count;
};

// The result's pixel (2i, 2j) sees the input's (i, j), (i, j-1), (i-1, j), (i-1, j-1); (2i, 2j+1) and (2i+1, 2j) see
// two of these, (2i+1, 2j+1) one: four phases, (even, even), (odd, even), (even, odd), (odd, odd) rows and columns. One
// product serves two phases where both see a shift. The sums of a product begin with those of a pair: ptxas keeps sums
// in place, and products in flight, only where each is another's first part.
struct Up {
    static constexpr int kUnits = 1, kPhases = 4, kScale = 2;
    static constexpr int phase_row(int phase) { return phase % 2; }
    static constexpr int phase_column(int phase) { return phase / 2; }
    static constexpr int tap(int slot) { return static_cast<int>(0x876524130ll >> 4 * slot & 15); }
    static constexpr int kTaps[1] = {6}, kWide[1] = {3}, kFirst = 2;  // products, of several phases, that begin sums
    static constexpr Tap kTap[1][6] = {
        {{1, 1, 0, 0, 2}, {1, 1, 2, 2, 2}, {1, 0, 4, 0, 2}, {0, 1, 6, 0, 1}, {0, 1, 7, 2, 1}, {0, 0, 8, 0, 1}}};
};

// The result's pixel (i, j) sees 2i, 2i+1, 2i+2 and likewise columns: boxes of even and odd rows and columns of the
// input, in four units.
struct Down {
    static constexpr int kUnits = 4, kPhases = 1, kScale = 1;
    static constexpr int phase_row(int) { return 0; }
    static constexpr int phase_column(int) { return 0; }
    static constexpr int tap(int slot) { return slot; }
    static constexpr int kTaps[4] = {4, 2, 2, 1}, kWide[4] = {4, 2, 2, 1}, kFirst = 1;
    static constexpr Tap kTap[4][6] = {{{0, 0, 0, 0, 1}, {0, 1, 2, 0, 1}, {1, 0, 6, 0, 1}, {1, 1, 8, 0, 1}},
                                       {{0, 0, 1, 0, 1}, {1, 0, 7, 0, 1}},
                                       {{0, 0, 3, 0, 1}, {0, 1, 5, 0, 1}},
                                       {{0, 0, 4, 0, 1}}};
};

// kOut channels of the result; kBlocks x 8 rows of 8 pixels a tile; kChunk channels of the input, 64 or 32, a step.
template <typename Scheme, int kOut, int kBlocks, int kChunk>
struct Tile {
    static constexpr int kRows = kBlocks * kSide, kBoxRows = kRows + 1, kRowBytes = 2 * kChunk;
    static constexpr int kBoxBytes = kBoxRows * kBoxColumns * kRowBytes;
    static constexpr int kStageBytes = (kBoxBytes + 1023) / 1024 * 1024;
    static constexpr int kTapBytes = kOut * kRowBytes, kChunkBytes = 9 * kTapBytes;  // of the weights
    static constexpr int kSums = Scheme::kPhases * kOut / 2;  // of a thread and 64 pixels
    static constexpr int kBarrierBytes = (2 * kGroups * kMaxDepth + kMaxChunks) * 8;

    // Stages of each ring beside the weights of so many chunks; below two it cannot run.
    static constexpr int depth(int chunks) {
        const int found = (kSharedBytes - kBarrierBytes - chunks * kChunkBytes) / (kGroups * kStageBytes);
        return found < kMaxDepth ? found : kMaxDepth;
    }
    static constexpr int bytes(int chunks) {
        return chunks * kChunkBytes + kGroups * depth(chunks) * kStageBytes + kBarrierBytes;
    }
    static constexpr int pixel(int row, int column, int k) {  // bytes from the start of a stage
        return (row * kBoxColumns + column) * kRowBytes + 32 * k;
    }
    static constexpr int weight(int slot, int k) { return slot * kTapBytes + 32 * k; }  // from the start of a chunk
};

}  // namespace clone_fast::strided

// How one thread of upfirdn2d's fast kernels sees the image: as windows onto one input row after the other.
//
// A thread computes kOut neighbouring columns, kValues numbers in each, and slides down the rows. From an input row it
// needs kIn columns. Three kinds of windows: Vectors through shared memory, which a block loads in pieces of 16 bytes,
// once for all its threads and several rows ahead; Beside (_upfirdn2d_beside.cuh), of some planes in such pieces, without
// shared memory; and Elements, for whatever does not lie in such pieces. They offer
//   begin()              starts to load
//   row_into<u>(window)  the next row of the band, number u modulo 4, as float32, zeros outside the image
//   store(row, values)   the next row of output, number `row` of the band; kept only if the band has one of that number
#pragma once

#include "_upfirdn2d_ptx.cuh"

namespace clone_fast::fir {

inline constexpr int kThreads = 128, kBlocks = 4;  // in a block; of them on a multiprocessor
inline constexpr int kGroup = 2, kStages = 3;      // rows from barrier to barrier; such groups in shared memory
static_assert(4 % kGroup == 0 && kStages >= 2);

// An image is h x w pixels of c numbers (NCHW: a plane, c = 1). Its output is cut into bands of rows, strips of columns
// and splits of channels; such a piece is the work of `lanes` threads of a block.
struct Grid {
    int c, h, w, oh, ow;
    int first_x, first_y;    // the input column and row where the window of the first output column and row begins
    int start_x, start_y;    // that output column and row: 0, or -1 where the phase of an upsampling wants it
    int rows;                // rows (upsampling: pairs of rows) of output in a band
    int pieces, columns;     // pieces in all; groups of columns in a strip
    int chunks;              // 16 bytes each: a row of a piece in shared memory
    Divider lanes, vectors;  // columns * vectors; vectors of channels in a split (Elements: channels)
    Divider splits, strips, bands;
    float gain;
    int flip, separable;
};

// What windows that only filter are told about what follows.
struct Nothing {};

// Input columns under `out` output columns. Upsampling: where the first of them has the even phase it takes one more.
template <int kUp, int kDown>
__host__ __device__ constexpr int window_of(int out, bool even) {
    return kUp == 2 ? out / 2 + 1 + even : kDown * (out - 1) + 4;
}

// The piece of the calling thread, and its lane there.
struct Place {
    int slot, lane, group, vector;
    std::uint32_t image, band, strip, split;
    bool works;

    __device__ explicit Place(const Grid& g) {
        const std::uint32_t slots = kThreads / g.lanes.divisor;
        std::uint32_t lane_, vector_;
        slot = g.lanes.divide(threadIdx.x, lane_);
        group = g.vectors.divide(lane_, vector_);
        lane = lane_, vector = vector_;
        const std::uint32_t piece = blockIdx.x * slots + slot;
        works = slot < slots && piece < g.pieces;
        if (!works) slot = 0;  // a thread without work reads what others read, and stores nothing
        image = g.bands.divide(g.strips.divide(g.splits.divide(works ? piece : 0, split), strip), band);
    }
};

// kLanes<T> numbers are a vector: channels of a pixel in channels_last, columns of a plane in NCHW. There the window
// may begin inside a vector, and is shifted into place in registers.
template <typename T, int kUp, int kDown, bool kChannelsLast, bool kEvenPhase>
struct Vectors {
    using Finish = Nothing;
    static constexpr int kV = kLanes<T>;
    static constexpr bool kEven = kEvenPhase, kFinishes = false, kBeside = false;
    static constexpr int kOut = kChannelsLast ? (kDown == 2 ? 1 : 2) : kV, kValues = kChannelsLast ? kV : 1;
    static constexpr int kIn = window_of<kUp, kDown>(kOut, kEven);
    static constexpr int kRead = kChannelsLast ? kIn : (kIn + 2 * (kV - 1)) / kV;  // vectors that a window touches
    // vectors of an input row that a thread copies, with four groups of columns in a strip or more
    static constexpr int kCopies = kChannelsLast ? kOut * kDown / kUp + 1 : kUp == 2 ? 1 : kDown + 1;

    static int chunks(int columns, int vectors) {
        if (kChannelsLast) return window_of<kUp, kDown>(columns * kOut, false) * vectors;
        return (kV - 1 + (columns - 1) * kOut * kDown / kUp) / kV + kRead;  // up to what the last thread reads
    }
    static int shared_bytes(const Grid& g) {
        return kStages * kGroup * (kThreads / static_cast<int>(g.lanes.divisor)) * g.chunks * 16;
    }

    const T* x;  // where this thread's first copy of the next row comes from
    T* y;        // this thread's part of the next row of output, of which the first `lead` lie before the band
    int iy, end, row, out_row, c, skipped, stored;
    std::uint32_t into, from, wrap, row_bytes;  // in shared memory: the next row's copy; this thread's next window
    std::uint32_t copies_left, reads_left;      // bytes until the end of the ring
    int copy_step, into_step, step, shift;
    bool copies[kCopies], in[kCopies], out[kOut];

    __device__ Vectors(const Grid& g, const Place& at, const T* x_, T* y_, int lead) {
        extern __shared__ Bytes16 ring[];  // [kStages * kGroup rows, pieces, chunks]
        c = g.c, row = g.w * c, out_row = g.ow * c;
        const int column = static_cast<int>(at.strip) * g.columns * kOut, mine = at.group * kOut;
        const int ox = g.start_x + column + mine, ix = g.first_x + column * kDown / kUp;
        const int channel = (static_cast<int>(at.split * g.vectors.divisor) + at.vector) * (kChannelsLast ? kV : 0);
        const std::int64_t pixels = static_cast<std::int64_t>(at.image) * c;
        iy = g.first_y + static_cast<int>(at.band) * g.rows * kDown;
        end = min(g.h, iy + window_of<kUp, kDown>(g.rows * kUp, false));
        const int oy = g.start_y + static_cast<int>(at.band) * g.rows * kUp;
        skipped = max(0, -oy), stored = min(g.rows * kUp, g.oh - oy) - skipped;
        y = y_ + pixels * g.oh * g.ow + static_cast<std::int64_t>(oy - lead) * out_row +
            static_cast<std::int64_t>(ox) * c + channel;

        row_bytes = (kThreads / g.lanes.divisor) * g.chunks * 16;
        wrap = kStages * kGroup * row_bytes, copies_left = reads_left = wrap;
        into_step = g.lanes.divisor * 16;
        const std::uint32_t piece = shared_address(ring) + at.slot * g.chunks * 16;
        into = piece + at.lane * 16;
        int begin, stride;  // the copies' first column and the columns between them
        if constexpr (kChannelsLast) {
            begin = ix + at.group, stride = g.columns, step = g.vectors.divisor * 16, shift = 0;
            from = piece + mine * kDown / kUp * step + at.vector * 16;
        } else {
            const int inside = ix & (kV - 1), window = inside + mine * kDown / kUp;
            begin = ix - inside + at.lane * kV, stride = g.columns * kV, step = 16, shift = window & (kV - 1);
            from = piece + window / kV * 16;
        }
        x = x_ + pixels * g.h * g.w + static_cast<std::int64_t>(iy) * row + static_cast<std::int64_t>(begin) * c +
            channel;
        copy_step = stride * c;
#pragma unroll
        for (int i = 0; i < kCopies; ++i) {
            copies[i] = at.works && at.lane * 16 + i * into_step < g.chunks * 16;
            in[i] = begin + i * stride >= 0 && begin + i * stride < g.w;
        }
#pragma unroll
        for (int i = 0; i < kOut; ++i) out[i] = at.works && ox + i >= 0 && ox + i < g.ow;
    }

    // The next kGroup rows, on their way to shared memory.
    __device__ __forceinline__ void copy_rows() {
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
            const bool inside = iy >= 0 && iy < end;
#pragma unroll
            for (int i = 0; i < kCopies; ++i)
                if (copies[i]) copy16_async(into + j * row_bytes + i * into_step, x + i * copy_step, inside && in[i]);
            x += row, ++iy;
        }
        end_copies();
        into += kGroup * row_bytes, copies_left -= kGroup * row_bytes;
        if (copies_left == 0) into -= wrap, copies_left = wrap;
    }
    __device__ __forceinline__ void begin() {
#pragma unroll
        for (int s = 0; s < kStages - 1; ++s) copy_rows();
    }
    template <int u>
    __device__ __forceinline__ void row_into(float (&window)[kIn][kValues]) {
        if constexpr (u % kGroup == 0) {
            wait_for_copies<kStages - 2>();
            __syncthreads();  // everybody's copies have come, and nobody reads the rows that are overwritten next
            copy_rows();
        }
        read_row<u>(window);
    }
    template <int u>
    __device__ __forceinline__ void read_row(float (&window)[kIn][kValues]) {
        if constexpr (kChannelsLast) {
#pragma unroll
            for (int i = 0; i < kIn; ++i) unpack<T>(load_shared16(from + i * step), window[i]);
        } else {
            shifted(window);
        }
        from += row_bytes;
        if constexpr (u % kGroup == kGroup - 1) {
            reads_left -= kGroup * row_bytes;
            if (reads_left == 0) from -= wrap, reads_left = wrap;
        }
    }
    __device__ __forceinline__ void shifted(float (&window)[kIn][kValues]) const {
        constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
        constexpr int kWords = (kIn + kPerWord - 1) / kPerWord + kPerWord - 1;  // before a shift inside the word
        std::uint32_t word[4 * kRead + 8] = {};
#pragma unroll
        for (int i = 0; i < kRead; ++i) {
            const Bytes16 bytes = load_shared16(from + 16 * i);
            word[4 * i] = bytes.x, word[4 * i + 1] = bytes.y, word[4 * i + 2] = bytes.z, word[4 * i + 3] = bytes.w;
        }
        const int words = shift / kPerWord;
#pragma unroll
        for (int i = 0; i < kWords + 1; ++i) word[i] = words & 2 ? word[i + 2] : word[i];
#pragma unroll
        for (int i = 0; i < kWords; ++i) word[i] = words & 1 ? word[i + 1] : word[i];
        if constexpr (kPerWord == 2) {
#pragma unroll
            for (int i = 0; i < kWords - 1; ++i) word[i] = __funnelshift_r(word[i], word[i + 1], 16 * (shift & 1));
        }
#pragma unroll
        for (int i = 0; i < kIn; i += kV) {
            const int at = i / kPerWord;
            float numbers[kV];
            unpack<T>(make_uint4(word[at], word[at + 1], word[at + 2], word[at + 3]), numbers);
#pragma unroll
            for (int j = 0; j < kV && i + j < kIn; ++j) window[i + j][0] = numbers[j];
        }
    }
    __device__ __forceinline__ void store(int number, const float (&values)[kOut][kValues]) {
        const bool wanted = static_cast<unsigned>(number - skipped) < static_cast<unsigned>(stored);
        if constexpr (kChannelsLast) {
#pragma unroll
            for (int i = 0; i < kOut; ++i)
                if (wanted && out[i]) store16(y + i * c, pack<T>(values[i]));
        } else {
            float numbers[kV];
#pragma unroll
            for (int i = 0; i < kV; ++i) numbers[i] = values[i][0];
            if (wanted && out[0]) store16(y, pack<T>(numbers));
        }
        y += out_row;
    }
};

// Any layout, size and alignment: neighbouring threads have neighbouring numbers, and read them one at a time.
template <typename T, int kUp, int kDown>
struct Elements {
    static constexpr int kOut = 2, kValues = 1, kIn = window_of<kUp, kDown>(kOut, false);
    using Finish = Nothing;
    static constexpr bool kEven = false, kFinishes = false, kBeside = false;

    static int chunks(int, int) { return 0; }
    static int shared_bytes(const Grid&) { return 0; }

    const T* x;
    T* y;
    T ahead[4][kIn];
    int iy, end, row, out_row, c, skipped, stored;
    bool in[kIn], out[kOut];

    __device__ Elements(const Grid& g, const Place& at, const T* x_, T* y_, int lead) {
        c = g.c, row = g.w * c, out_row = g.ow * c;
        std::uint32_t channel;
        const int column = kOut * static_cast<int>(g.vectors.divide(at.strip * g.lanes.divisor + at.lane, channel));
        const int ox = g.start_x + column, ix = g.first_x + column * kDown / kUp;
        const std::int64_t pixels = static_cast<std::int64_t>(at.image) * c;
        x = x_ + pixels * g.h * g.w + static_cast<std::int64_t>(ix) * c + channel;
        const int oy = g.start_y + static_cast<int>(at.band) * g.rows * kUp;
        skipped = max(0, -oy), stored = min(g.rows * kUp, g.oh - oy) - skipped;
        y = y_ + pixels * g.oh * g.ow + static_cast<std::int64_t>(oy - lead) * out_row +
            static_cast<std::int64_t>(ox) * c + channel;
        iy = g.first_y + static_cast<int>(at.band) * g.rows * kDown;
        end = min(g.h, iy + window_of<kUp, kDown>(g.rows * kUp, false));
#pragma unroll
        for (int i = 0; i < kIn; ++i) in[i] = at.works && ix + i >= 0 && ix + i < g.w;
#pragma unroll
        for (int i = 0; i < kOut; ++i) out[i] = at.works && ox + i >= 0 && ox + i < g.ow;
    }
    __device__ __forceinline__ void load(T (&numbers)[kIn]) {
        const bool inside = iy >= 0 && iy < end;
        const T* from = x + static_cast<std::int64_t>(iy++) * row;
#pragma unroll
        for (int i = 0; i < kIn; ++i) {
            numbers[i] = from_float<T>(0.0f);
            if (inside && in[i]) numbers[i] = from[i * c];
        }
    }
    __device__ __forceinline__ void begin() {
#pragma unroll
        for (int a = 0; a < 4; ++a) load(ahead[a]);
    }
    template <int u>
    __device__ __forceinline__ void row_into(float (&window)[kIn][kValues]) {
#pragma unroll
        for (int i = 0; i < kIn; ++i) window[i][0] = to_float(ahead[u][i]);
        load(ahead[u]);
    }
    __device__ __forceinline__ void store(int number, const float (&values)[kOut][kValues]) {
        const bool wanted = static_cast<unsigned>(number - skipped) < static_cast<unsigned>(stored);
#pragma unroll
        for (int i = 0; i < kOut; ++i)
            if (wanted && out[i]) y[i * c] = from_float<T>(values[i][0]);
        y += out_row;
    }
};

}  // namespace clone_fast::fir

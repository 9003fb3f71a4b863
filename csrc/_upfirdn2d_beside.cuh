// Windows of upfirdn2d's fast kernels onto planes (NCHW), without shared memory and so without barriers: for
// down 2, and for 1:1 in half precision.
#pragma once

#include "_upfirdn2d_windows.cuh"

namespace clone_fast::fir {

// A thread loads the columns below its own output, four rows ahead, and asks the threads beside it for the kLeft columns
// before these and for those after. Where nobody is beside it, in its warp or its piece, it loads them itself; a thread
// is at one such end at most (see has_neighbours). x and y are vectors of 16 bytes, the padding is kLeft.
template <typename T, int kDown, int kLeft>
struct Beside {
    using Finish = Nothing;
    static constexpr bool kEven = false, kFinishes = false, kBeside = true;
    static constexpr int kV = kLanes<T>, kPerWord = 4 / static_cast<int>(sizeof(T));
    static constexpr int kOut = kV, kValues = 1, kIn = window_of<1, kDown>(kOut, false);
    static constexpr int kOwn = kDown * kV, kOwnWords = 4 * kDown, kRight = kIn - kOwn - kLeft;
    static constexpr int kLeftWords = ceil_div(kLeft, kPerWord), kRightWords = ceil_div(kRight, kPerWord);
    static constexpr int kEnd = kLeftWords > kRightWords ? kLeftWords : kRightWords;
    static_assert(kLeft > 0 && kRight > 0 && kLeftWords * kPerWord <= kV && kRightWords * kPerWord <= kV);

    static int chunks(int, int) { return 0; }
    static int shared_bytes(const Grid&) { return 0; }
    static bool has_neighbours(int lanes) { return lanes > 1 && (lanes % 32 == 0 || 32 % lanes == 0); }

    const T* x;
    T* y;
    Bytes16 ahead[4][kDown];
    std::uint32_t end_ahead[4][kEnd];  // at an end: what nobody beside has
    int iy, bottom, row, out_row, stored, end_offset;
    bool at_left, at_right, end_inside, out, in[kDown];

    __device__ Beside(const Grid& g, const Place& at, const T* x_, T* y_, int lead) {
        row = g.w, out_row = g.ow;
        const int ox = (static_cast<int>(at.strip) * g.columns + at.group) * kOut, own = ox * kDown;
        const int oy = static_cast<int>(at.band) * g.rows;
        iy = g.first_y + oy * kDown, bottom = min(g.h, iy + window_of<1, kDown>(g.rows, false));
        stored = min(g.rows, g.oh - oy);
        x = x_ + static_cast<std::int64_t>(at.image) * g.h * g.w + static_cast<std::int64_t>(iy) * row + own;
        y = y_ + static_cast<std::int64_t>(at.image) * g.oh * g.ow + static_cast<std::int64_t>(oy - lead) * out_row + ox;
        at_left = at.lane == 0 || threadIdx.x % 32 == 0;
        at_right = at.lane + 1 == static_cast<int>(g.lanes.divisor) || threadIdx.x % 32 == 31;
        end_offset = at_left ? -kLeftWords * kPerWord : kOwn;
        end_inside = at.works && ((at_left && own > 0 && own <= g.w) || (at_right && own + kOwn < g.w));
#pragma unroll
        for (int i = 0; i < kDown; ++i) in[i] = at.works && own + i * kV < g.w;
        out = at.works && ox < g.ow;
    }
    __device__ __forceinline__ void load(Bytes16 (&own)[kDown], std::uint32_t (&end)[kEnd]) {
        const bool inside = iy >= 0 && iy < bottom;
#pragma unroll
        for (int i = 0; i < kDown; ++i) {
            own[i] = make_uint4(0, 0, 0, 0);
            if (inside && in[i]) own[i] = load16(x + i * kV);
        }
#pragma unroll
        for (int i = 0; i < kEnd; ++i) {
            end[i] = 0;
            if (inside && end_inside) end[i] = reinterpret_cast<const std::uint32_t*>(x + end_offset)[i];
        }
        x += row, ++iy;
    }
    __device__ __forceinline__ void begin() {
#pragma unroll
        for (int r = 0; r < 4; ++r) load(ahead[r], end_ahead[r]);
    }
    template <int u>
    __device__ __forceinline__ void row_into(float (&window)[kIn][kValues]) {
        std::uint32_t words[kLeftWords + kOwnWords + kRightWords + 4];  // whole vectors are unpacked
        std::uint32_t* own = words + kLeftWords;
#pragma unroll
        for (int i = 0; i < kDown; ++i) {
            const Bytes16 bytes = ahead[u][i];
            own[4 * i] = bytes.x, own[4 * i + 1] = bytes.y, own[4 * i + 2] = bytes.z, own[4 * i + 3] = bytes.w;
        }
#pragma unroll
        for (int i = 0; i < kLeftWords; ++i) {
            words[i] = __shfl_up_sync(0xffffffffu, own[kOwnWords - kLeftWords + i], 1);
            if (at_left) words[i] = end_ahead[u][i];
        }
#pragma unroll
        for (int i = 0; i < kRightWords; ++i) {
            own[kOwnWords + i] = __shfl_down_sync(0xffffffffu, own[i], 1);
            if (at_right) own[kOwnWords + i] = end_ahead[u][i];
        }
        load(ahead[u], end_ahead[u]);
        constexpr int kSkipped = kLeftWords * kPerWord - kLeft;
#pragma unroll
        for (int i = 0; i < kIn + kSkipped; i += kV) {
            const std::uint32_t* from = words + i / kPerWord;
            float numbers[kV];
            unpack<T>(make_uint4(from[0], from[1], from[2], from[3]), numbers);
#pragma unroll
            for (int j = 0; j < kV; ++j) {
                if (i + j >= kSkipped && i + j - kSkipped < kIn) window[i + j - kSkipped][0] = numbers[j];
            }
        }
    }
    __device__ __forceinline__ void store(int number, const float (&values)[kOut][kValues]) {
        const bool wanted = static_cast<unsigned>(number) < static_cast<unsigned>(stored);
        float numbers[kV];
#pragma unroll
        for (int i = 0; i < kV; ++i) numbers[i] = values[i][0];
        if (wanted && out) store16(y, pack<T>(numbers));
        y += out_row;
    }
};

}  // namespace clone_fast::fir

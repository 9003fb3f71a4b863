// upfirdn2d with a 4x4 filter and no resampling, up 2 or down 2: what StyleGAN2 is made of, and its adjoints.
//
// A thread slides down its columns. Every input row is converted once and joins the sums of all output rows that it
// reaches, which wait in registers.
#pragma once

#include "_upfirdn2d_windows.cuh"

namespace clone_fast::fir {

inline constexpr unsigned kWarp = 0xffffffffu;

// F[ky][kx] of the correlation y[oy][ox] = sum F[ky][kx] x[oy + ky][ox + kx].
__device__ __forceinline__ float tap(const float* f, const Grid& g, int ky, int kx) {
    if (!g.flip) ky = 3 - ky, kx = 3 - kx;
    return g.separable ? __ldg(f + ky) * __ldg(f + kx) : __ldg(f + 4 * ky + kx);
}

struct Dense {
    float tap[4][4];

    __device__ Dense(const float* f, const Grid& g) {
#pragma unroll
        for (int i = 0; i < 16; ++i) tap[i / 4][i % 4] = g.gain * fir::tap(f, g, i / 4, i % 4);
    }
};

// F = outer(y, x), where it is that up to float32 rounding. Found out here since the filter never visits the host.
struct Separable {
    float y[4], x[4];
    bool exact;

    __device__ Separable(const float* f, const Grid& g) {
        const int lane = threadIdx.x % 16;  // the upper half of a warp repeats the lower
        const float mine = tap(f, g, lane / 4, lane % 4);
        float largest = fabsf(mine);
#pragma unroll
        for (int offset = 8; offset > 0; offset /= 2) largest = fmaxf(largest, __shfl_xor_sync(kWarp, largest, offset));
        const int pivot = (__ffs(__ballot_sync(kWarp, fabsf(mine) == largest)) - 1) & 15;
        const float scaled = mine / __shfl_sync(kWarp, mine, pivot);  // in [-1, 1], the pivot 1
        const float column = __shfl_sync(kWarp, scaled, (lane & 12) + pivot % 4);
        const float across = __shfl_sync(kWarp, scaled, (pivot & 12) + lane % 4);
        exact = __all_sync(kWarp, fabsf(scaled - column * across) <= 4e-7f * fabsf(scaled));
        const float scale = g.gain * __shfl_sync(kWarp, mine, pivot);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            y[k] = __shfl_sync(kWarp, column, 4 * k);
            x[k] = __shfl_sync(kWarp, across, k) * scale;
        }
    }
};

// No resampling: row r joins the sums of output rows r - 3 .. r, which wait in slots (row % 4); the newest begins here.
// Windows that finish (_upfirdn2d_finish.cuh) say what a sum begins with.
template <class Windows>
struct Same {
    static constexpr int kOut = Windows::kOut, kValues = Windows::kValues;
    static constexpr int kLead = 3;  // rows of output that are begun outside the band
    using Begin = float[kOut][kValues];
    float sums[4][kOut][kValues] = {};

    __device__ static int input_rows(int rows) { return rows + 3; }

    // factor * value + what the sum begins with.
    __device__ __forceinline__ static float begun(float factor, float value, const Begin& begin, int p, int q) {
        if constexpr (Windows::kFinishes) return fmaf(factor, value, begin[p][q]);
        else return factor * value;
    }
    template <int r>
    __device__ __forceinline__ void add(const Separable& f, const float (&window)[kOut + 3][kValues],
                                        const Begin& begin) {
#pragma unroll
        for (int p = 0; p < kOut; ++p) {
#pragma unroll
            for (int q = 0; q < kValues; ++q) {
                float across = f.x[0] * window[p][q];
#pragma unroll
                for (int k = 1; k < 4; ++k) across = fmaf(f.x[k], window[p + k][q], across);
                sums[r & 3][p][q] = begun(f.y[0], across, begin, p, q);
#pragma unroll
                for (int k = 1; k < 4; ++k) sums[(r - k) & 3][p][q] = fmaf(f.y[k], across, sums[(r - k) & 3][p][q]);
            }
        }
    }
    template <int r>
    __device__ __forceinline__ void add(const Dense& f, const float (&window)[kOut + 3][kValues], const Begin& begin) {
#pragma unroll
        for (int p = 0; p < kOut; ++p) {
#pragma unroll
            for (int q = 0; q < kValues; ++q) {
#pragma unroll
                for (int i = 0; i < 16; ++i) {
                    float& sum = sums[(r - i / 4) & 3][p][q];
                    sum = i == 0 ? begun(f.tap[0][0], window[p][q], begin, p, q)
                                 : fmaf(f.tap[i / 4][i % 4], window[p + i % 4][q], sum);
                }
            }
        }
    }
    template <int r, class Filter>
    __device__ __forceinline__ void row(Windows& at, const Filter& f, int first) {
        float window[Windows::kIn][kValues];
        at.template row_into<r>(window);
        Begin begin;
        if constexpr (Windows::kFinishes) at.template sums_begin<r>(begin);
        add<r>(f, window, begin);
        at.store(first + r - kLead, sums[(r + 1) & 3]);
    }
};

// Down 2: a pair of rows begins the sum of one output row with the upper half of the filter and ends that of the row
// above with the lower.
template <class Windows>
struct Down {
    static constexpr int kOut = Windows::kOut, kValues = Windows::kValues;
    static constexpr int kLead = 1;
    float sums[2][kOut][kValues] = {};

    __device__ static int input_rows(int rows) { return 2 * rows + 2; }

    template <int r>
    __device__ __forceinline__ void row(Windows& at, const Dense& f, int first) {
        constexpr int half = r % 2, pair = r / 2;
        float window[Windows::kIn][kValues];
        at.template row_into<r>(window);
#pragma unroll
        for (int p = 0; p < kOut; ++p) {
#pragma unroll
            for (int q = 0; q < kValues; ++q) {
                float &begun = sums[pair][p][q], &ended = sums[1 - pair][p][q];
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const float value = window[2 * p + k][q];
                    begun = half + k == 0 ? f.tap[0][0] * value : fmaf(f.tap[half][k], value, begun);
                    ended = fmaf(f.tap[2 + half][k], value, ended);
                }
            }
        }
        if (half == 1) at.store(first / 2 + pair - kLead, sums[1 - pair]);
    }
};

// Up 2: a pair of output rows between two input rows. The upper sees taps 1 and 3, the lower 0 and 2; columns likewise,
// unless their phase is even. Windows that finish (_upfirdn2d_add.cu) add to such a pair what they loaded before.
template <class Windows>
struct Up {
    static constexpr int kOut = Windows::kOut, kValues = Windows::kValues;
    static constexpr int kLead = 2;
    float windows[2][Windows::kIn][kValues] = {};

    __device__ static int input_rows(int pairs) { return pairs + 1; }

    template <int r>
    __device__ __forceinline__ void row(Windows& at, const Dense& f, int first) {
        if constexpr (Windows::kFinishes) at.load_pair(2 * (first + r) - kLead);
        at.template row_into<r>(windows[r % 2]);
        const auto &above = windows[1 - r % 2], &below = windows[r % 2];
#pragma unroll
        for (int lower = 0; lower < 2; ++lower) {
            float values[kOut][kValues];
#pragma unroll
            for (int p = 0; p < kOut; ++p) {
                const int ky = 1 - lower, kx = Windows::kEven ? p % 2 : 1 - p % 2;
                const int i = Windows::kEven ? (p + 1) / 2 : p / 2;
#pragma unroll
                for (int q = 0; q < kValues; ++q) {
                    float sum = f.tap[ky][kx] * above[i][q];
                    sum = fmaf(f.tap[ky][kx + 2], above[i + 1][q], sum);
                    sum = fmaf(f.tap[ky + 2][kx], below[i][q], sum);
                    values[p][q] = fmaf(f.tap[ky + 2][kx + 2], below[i + 1][q], sum);
                }
            }
            if constexpr (Windows::kFinishes) at.add(lower, values);
            at.store(2 * (first + r) + lower - kLead, values);
        }
    }
};

template <class Step, class Windows, class Filter>
__device__ __forceinline__ void slide(Windows& at, const Filter& f, const Grid& g) {
    Step step;
    const int rows = Step::input_rows(g.rows);  // the same for the whole block, which meets at every group of rows
    for (int first = 0; first < rows; first += 4) {
        step.template row<0>(at, f, first);
        step.template row<1>(at, f, first);
        step.template row<2>(at, f, first);
        step.template row<3>(at, f, first);
    }
}

template <typename T, int kUp, int kDown, class Windows>
__global__ void __launch_bounds__(kThreads, kBlocks)
    fir4_kernel(const T* __restrict__ x, const float* __restrict__ f, T* __restrict__ y,
                const __grid_constant__ Grid g, const __grid_constant__ typename Windows::Finish finish) {
    using NotUp = std::conditional_t<kDown == 2, Down<Windows>, Same<Windows>>;
    using Step = std::conditional_t<kUp == 2, Up<Windows>, NotUp>;
    const Place place(g);
    Windows at(g, place, x, y, Step::kLead);
    if constexpr (Windows::kFinishes) at.begin_finish(finish, g, place);
    at.begin();
    if constexpr (kUp == 1 && kDown == 1) {
        const Separable separable(f, g);
        if (separable.exact) return slide<Step>(at, separable, g);
    }
    slide<Step>(at, Dense(f, g), g);
}

}  // namespace clone_fast::fir

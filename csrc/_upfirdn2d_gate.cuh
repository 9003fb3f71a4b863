// Windows of upfirdn2d's fast kernels onto an image that is made while it is read: the gradient that comes to a
// convolution's result, taken through the activation, and added up for whatever else that result was made of.
#pragma once

#include "_upfirdn2d_launch.cuh"

namespace clone_fast::fir {

// All in the dtype of the image, but for the sums. Of the sums what is null is not wanted; the dots are here where
// kDots, the noise where it is read, for its strength or for them.
template <typename T>
struct Gating {
    const T* result;           // of the activation, as the image lies
    const T* noise;            // [h, w], sample n at n * noise_stride
    const T* strength;         // its factor, one number; null: 1
    const T* bias;             // [c]; null: none
    std::int64_t noise_stride;
    float positive, negative;  // what the gradient is multiplied by, where the result is above zero and elsewhere
    float limit;               // where the result is beyond it there is no gradient; infinity: none
    float* of_bias;            // [n, bands, strips, c]
    float* of_dots;            // likewise
    float* of_strength;        // [blocks]
};

// The gradients where the results are within [-limit, limit], a number of T's; zeros where they are not, or NaN.
template <typename T>
__device__ __forceinline__ Bytes16 within(Bytes16 gradients, Bytes16 results, float limit) {
    std::uint32_t words[4] = {gradients.x, gradients.y, gradients.z, gradients.w};
    const std::uint32_t seen[4] = {results.x, results.y, results.z, results.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (std::is_same_v<T, float>) words[i] = fabsf(__uint_as_float(seen[i])) <= limit ? words[i] : 0u;
        else words[i] &= pair_within<T>(seen[i], pack_pair<T>(limit, limit));
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

// What the threads have added up, over the columns of each piece of the block: [pieces, channels of a split], in the same
// order every time; pieces lie `apart` such rows from one another.
template <int kV>
__device__ __forceinline__ void add_up(const float (&mine)[kV], const Grid& g, float* to, int apart = 1) {
    extern __shared__ Bytes16 ring[];
    float* sums = reinterpret_cast<float*>(ring);  // [pieces of the block, columns, channels of a split]
    const int lanes = g.lanes.divisor, channels = g.vectors.divisor * kV, pieces = kThreads / lanes;
    __syncthreads();  // nobody reads what lay there
#pragma unroll
    for (int q = 0; q < kV; ++q) sums[threadIdx.x * kV + q] = mine[q];
    __syncthreads();
    const int first = blockIdx.x * pieces, here = min(pieces, g.pieces - first);
    for (int i = threadIdx.x; i < here * channels; i += kThreads) {
        const int piece = i / channels, channel = i % channels;
        float sum = 0.0f;
        for (int group = 0; group < g.columns; ++group) sum += sums[piece * lanes * kV + group * channels + channel];
        to[((first + piece) * apart) * channels + channel] = sum;
    }
}

// A thread makes of the gradient and the result that it has copied itself the gradient before the activation, rounded
// to T, between the arrival of its copies and the barrier behind which all read them. Each pixel belongs to the piece
// below whose output it lies; a thread adds up what it made of its piece's.
template <typename T, bool kNoise, bool kDots>
struct Gated : Vectors<T, 1, 1, true, false> {
    using Base = Vectors<T, 1, 1, true, false>;
    using Base::copies, Base::copy_step, Base::end, Base::from, Base::in, Base::into, Base::into_step, Base::iy;
    using Base::kCopies, Base::kIn, Base::kV, Base::kValues, Base::row, Base::row_bytes, Base::step, Base::wrap;
    using Base::x;

    static int shared_bytes(const Grid& g) { return 2 * Base::shared_bytes(g); }  // the results behind the gradients

    const Gating<T>* gating;
    const Grid* grid;
    const T* image;
    int number, rows;     // of the next row to be gated, from the first of the band; how many the band has
    int noise;            // where that row's begins for this thread's first copy
    std::uint32_t back;   // from this thread's window to what it copied of that row
    bool inner;           // whether the first copy is in a column of the piece's own: else the third is; the second is
    T levels[kGroup][2];  // the noise of the next rows to be gated, at the first or third copy and at the second
    float factor, of_strength = 0.0f, of_bias[kV] = {}, of_dots[kV] = {};

    using Base::Base;

    __device__ __forceinline__ void begin_gate(const Gating<T>& gating_, const Grid& g, const Place& at, const T* x_) {
        gating = &gating_, grid = &g, image = x_;
        number = g.first_y, rows = max(0, min(g.rows, g.h - static_cast<int>(at.band) * g.rows));
        back = at.group * step;
        inner = at.group + g.first_x >= 0;
        this->skipped = 0;  // as without resampling it is, but now the compiler knows
        if constexpr (kNoise) {
            factor = gating->strength ? to_float(*gating->strength) : 1.0f;
            noise = at.image * gating->noise_stride + iy * g.w + static_cast<int>(at.strip) * 2 * g.columns + at.group +
                    g.first_x;
            load_noise();
        }
    }
    __device__ __forceinline__ bool is_own(int row_number) const {
        return static_cast<unsigned>(row_number) < static_cast<unsigned>(rows);
    }
    __device__ __forceinline__ void load_noise() {
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
            levels[j][0] = levels[j][1] = from_float<T>(0.0f);
            const T* at = gating->noise + noise;
            const bool first = inner ? in[0] : copies[2] && in[2];
            if (is_own(number + j) && first) levels[j][0] = at[inner ? 0 : 2 * grid->columns];
            if (is_own(number + j) && in[1] && copies[1]) levels[j][1] = at[grid->columns];
            noise += grid->w;
        }
    }
    __device__ __forceinline__ void copy_rows() {
        const T* result = gating->result + (x - image);
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
#pragma unroll
            for (int i = 0; i < kCopies; ++i) {
                const bool real = iy + j >= 0 && iy + j < end && in[i];
                const std::uint32_t to = into + j * row_bytes + i * into_step;
                if (copies[i]) copy16_async(to + wrap, result + j * row + i * copy_step, real);
            }
        }
        Base::copy_rows();  // which ends the group
    }
    __device__ __forceinline__ void begin() {
#pragma unroll
        for (int s = 0; s < kStages - 1; ++s) copy_rows();
    }
    __device__ __forceinline__ void gate_rows() {
#pragma unroll
        for (int i = 0; i < kCopies; ++i) {
            if (!copies[i]) continue;
            const std::uint32_t at = from - back + i * into_step;
#pragma unroll
            for (int j = 0; j < kGroup; ++j) {
                const Bytes16 gradients = load_shared16(at + j * row_bytes);
                const Bytes16 results = load_shared16(at + j * row_bytes + wrap);
                float values[kV], seen[kV];
                unpack<T>(within<T>(gradients, results, gating->limit), values), unpack<T>(results, seen);
                const bool is_own_column = i == 1 || inner == (i == 0);
                gate(values, seen, is_own_column && is_own(number + j), kNoise ? to_float(levels[j][i % 2]) : 0.0f);
                store_shared16(at + j * row_bytes, pack<T>(values));
            }
        }
        number += kGroup;
        if constexpr (kNoise) load_noise();
    }
    // The gradient, and with the dots the sums of gradient * result - gated gradient * what was added.
    __device__ __forceinline__ void gate(float (&values)[kV], const float (&seen)[kV], bool is_own_pixel, float level) {
        if constexpr (kDots) {
            if (is_own_pixel) {
#pragma unroll
                for (int q = 0; q < kV; ++q) of_dots[q] = fmaf(values[q], seen[q], of_dots[q]);
            }
        }
#pragma unroll
        for (int q = 0; q < kV; ++q) values[q] *= seen[q] > 0.0f ? gating->positive : gating->negative;
        if (!is_own_pixel) return;
        float of_pixel = 0.0f;
#pragma unroll
        for (int q = 0; q < kV; ++q) {
            of_bias[q] += values[q];
            if constexpr (kNoise) of_pixel += values[q];
            if constexpr (kDots && kNoise) of_dots[q] = fmaf(-factor * level, values[q], of_dots[q]);
        }
        if constexpr (kNoise) of_strength = fmaf(of_pixel, level, of_strength);
    }
    template <int u>
    __device__ __forceinline__ void row_into(float (&window)[kIn][kValues]) {
        if constexpr (u % kGroup == 0) {
            wait_for_copies<kStages - 2>();
            gate_rows();
            __syncthreads();  // everybody has gated theirs, and nobody reads the rows that are overwritten next
            copy_rows();
        }
        Base::template read_row<u>(window);
    }

    // What the block has added up.
    __device__ __forceinline__ void end_gate(const Place& at) {
        wait_for_copies<0>();  // into memory that is used again
        if (gating->of_strength) {
            const float sum = block_sum<kThreads>(of_strength);
            if (threadIdx.x == 0) gating->of_strength[blockIdx.x] = sum;
        }
        if constexpr (kDots) {
            const int channel = (at.split * grid->vectors.divisor + at.vector) * kV;
#pragma unroll
            for (int q = 0; q < kV; ++q) {
                if (gating->bias) of_dots[q] = fmaf(-to_float(gating->bias[channel + q]), of_bias[q], of_dots[q]);
            }
            add_up(of_dots, *grid, gating->of_dots);
        }
        if (gating->of_bias) add_up(of_bias, *grid, gating->of_bias);
    }
};

// How an image is cut up for these windows, in channels_last: a block slides over the rows of its band and 3 more, 4 at a
// time.
template <typename T, class Windows, typename Kernel>
Grid cut_in_fours(Kernel* kernel, const Upfirdn2d& a) {
    const int vectors = vectors_of<T>(a.c);
    Grid g = cut<1, 1, Windows>(kernel, a, a.c / kLanes<T> / vectors, vectors, 100);
    g.rows = ceil_div(g.rows + 3, 4) * 4 - 3;
    const int bands = ceil_div(a.oh, g.rows);
    g.pieces = g.pieces / static_cast<int>(g.bands.divisor) * bands, g.bands = Divider(bands);
    return g;
}

template <typename T, bool kNoise, bool kDots>
__global__ void __launch_bounds__(kThreads, kDots ? 3 : kBlocks)  // the dots' registers leave room for no more
    gate_kernel(const T* __restrict__ x, const float* __restrict__ f, T* __restrict__ y,
                const __grid_constant__ Grid g, const __grid_constant__ Gating<T> gating) {
    using Windows = Gated<T, kNoise, kDots>;
    using Step = Same<Windows>;
    const Place place(g);
    Windows at(g, place, x, y, Step::kLead);
    wait_for_previous();
    at.begin_gate(gating, g, place, x);
    at.begin();
    const Separable separable(f, g);
    if (separable.exact) slide<Step>(at, separable, g);
    else slide<Step>(at, Dense(f, g), g);
    at.end_gate(place);
}

}  // namespace clone_fast::fir

// Windows of upfirdn2d's fast kernels whose output goes back through the activation that made the image: the gradient of
// a convolution whose result another one filters.
#pragma once

#include "_upfirdn2d_gate.cuh"

namespace clone_fast::fir {

template <typename T>
struct Sloping {
    const T* result;           // of the activation, as the output lies
    const T* output;           // to tell where in it a thread begins
    float positive, negative;  // what the gradient is multiplied by, where the result is above zero and elsewhere
    float limit;               // where the result is beyond it there is no gradient; infinity: none
    float* of_bias;            // [n, bands, strips, c]: sums of the output; null: not wanted
};

// Of the results a thread reads none but those that it has copied itself, so they need no barrier. In registers there is
// no room for them: they wait in shared memory, four rows behind the image, the next one where the one before was read.
template <typename T>
struct Sloped : Vectors<T, 1, 1, true, false> {
    using Base = Vectors<T, 1, 1, true, false>;
    using Base::c, Base::kOut, Base::kV, Base::kValues, Base::out, Base::out_row, Base::stored, Base::y;
    static constexpr int kAhead = 4;  // rows, as many as `slide` takes at a time
    static constexpr int kRowBytes = kOut * kThreads * 16;

    static int shared_bytes(const Grid& g) { return Base::shared_bytes(g) + kAhead * kRowBytes; }

    const Sloping<T>* sloping;
    std::uint32_t results;
    float of_bias[kV] = {};

    using Base::Base;

    // The result below output row 0 of the band is read in row `lead`.
    __device__ __forceinline__ void begin_slope(const Sloping<T>& sloping_, int lead) {
        extern __shared__ Bytes16 ring[];
        sloping = &sloping_;
        results = shared_address(ring) + this->wrap + threadIdx.x * 16;
        this->skipped = 0;  // as without resampling it is, but now the compiler knows
        copy_results(lead, 0, lead);
    }
    __device__ __forceinline__ bool is_wanted(int number) const {
        return static_cast<unsigned>(number) < static_cast<unsigned>(stored);
    }
    // Below the row of output of this number, so many rows after that of y.
    __device__ __forceinline__ void copy_results(int slot, int number, int rows) {
        const T* result = sloping->result + (y - sloping->output) + rows * out_row;
        const bool wanted = is_wanted(number);
#pragma unroll
        for (int i = 0; i < kOut; ++i)
            copy16_async(results + slot * kRowBytes + i * kThreads * 16, result + i * c, wanted && out[i]);
    }
    template <int u>
    __device__ __forceinline__ void row_into(float (&window)[Base::kIn][kValues]) {
        if constexpr (u % kGroup == 0) {
            end_copies();  // the results of the group after the next one
            wait_for_copies<2 * (kStages - 2)>();
            __syncthreads();  // everybody's copies have come, and nobody reads the rows that are overwritten next
            Base::copy_rows();
        }
        Base::template read_row<u>(window);
    }
    __device__ __forceinline__ void store(int number, const float (&sums)[kOut][kValues]) {
        const int slot = (number + 3) % kAhead;
        const bool wanted = is_wanted(number);
#pragma unroll
        for (int i = 0; i < kOut; ++i) {
            float seen[kV], values[kV];
#pragma unroll
            for (int q = 0; q < kV; ++q) values[q] = sums[i][q];
            unpack<T>(load_shared16(results + slot * kRowBytes + i * kThreads * 16), seen);
            const bool mine = wanted && out[i];  // what is not stored does not count
#pragma unroll
            for (int q = 0; q < kV; ++q) {
                values[q] *= mine && fabsf(seen[q]) <= sloping->limit
                                 ? (seen[q] > 0.0f ? sloping->positive : sloping->negative)
                                 : 0.0f;
                of_bias[q] += values[q];
            }
            if (mine) store16(y + i * c, pack<T>(values));
        }
        copy_results(slot, number + kAhead, kAhead);
        y += out_row;
    }
};

template <typename T>  // of bfloat16 the registers have no room for more blocks
__global__ void __launch_bounds__(kThreads, std::is_same_v<T, Bfloat> ? 3 : kBlocks)
    slope_kernel(const T* __restrict__ x, const float* __restrict__ f, T* __restrict__ y,
                 const __grid_constant__ Grid g, const __grid_constant__ Sloping<T> sloping) {
    using Windows = Sloped<T>;
    using Step = Same<Windows>;
    const Place place(g);
    Windows at(g, place, x, y, Step::kLead);
    wait_for_previous();
    at.begin_slope(sloping, Step::kLead);
    at.begin();
    const Separable separable(f, g);
    if (separable.exact) slide<Step>(at, separable, g);
    else slide<Step>(at, Dense(f, g), g);
    wait_for_copies<0>();  // into memory that is used again
    if (sloping.of_bias) add_up(at.of_bias, g, sloping.of_bias);
}

}  // namespace clone_fast::fir

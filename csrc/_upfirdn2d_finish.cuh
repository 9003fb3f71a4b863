// Windows of upfirdn2d's fast kernels that finish a convolution: noise, bias, activation and clamp behind the filter.
#pragma once

#include "_ptx.cuh"
#include "_upfirdn2d_launch.cuh"

namespace clone_fast::fir {

// All in the dtype of the image. The gain is not here: it is positive, so it is a factor of the filter, of the bias and
// of the noise.
template <typename T>
struct Finishing {
    const T* noise;     // [oh, ow], sample n at n * noise_stride; null: none
    const T* strength;  // its factor, one number; null: 1
    const T* bias;      // [channels]; null: none
    std::int64_t noise_stride;
    int planes;         // channels that are images of their own: all of them in NCHW, 1 in channels_last
    float gain, slope;  // slope at most 1: what the activation multiplies numbers below zero by
    float clamp;        // infinity: none
};

template <typename T>
__device__ __forceinline__ std::uint32_t limited_word(std::uint32_t word, float limit) {
    if constexpr (std::is_same_v<T, float>) return __float_as_uint(limited(__uint_as_float(word), limit));
    else return limited_pair<T>(word, pack_pair<T>(-limit, -limit), pack_pair<T>(limit, limit));
}

// Base: Vectors in channels_last, or Elements. A sum begins with bias and noise, which were loaded two rows earlier.
template <class Base, typename T, bool kNoise>
struct Finished : Base {
    using Finish = Finishing<T>;
    using Base::kOut, Base::kValues, Base::y, Base::c, Base::out, Base::out_row, Base::stored;
    static constexpr bool kFinishes = true;
    static constexpr int kAhead = 2, kQuarters = kValues / 4;

    const T* noise;
    T ahead[kAhead][kOut];
    int noise_rows, noise_row;  // rows that are still to be loaded; from row to row
    float factor, single, slope, clamp;
    std::uint32_t bias;  // of several values: in shared memory, so that it takes no registers

    using Base::Base;

    __device__ __forceinline__ void begin_finish(const Finish& finish, const Grid& g, const Place& at) {
        slope = finish.slope, clamp = finish.clamp;
        const std::uint32_t sample = at.image / finish.planes;
        std::uint32_t channel;
        int column;
        if constexpr (kValues == 1) {
            column = kOut * static_cast<int>(g.vectors.divide(at.strip * g.lanes.divisor + at.lane, channel));
            channel += at.image % finish.planes;
            single = finish.bias ? to_float(finish.bias[channel]) * finish.gain : 0.0f;
        } else {
            column = (static_cast<int>(at.strip) * g.columns + at.group) * kOut;
            channel = (at.split * g.vectors.divisor + at.vector) * kValues;
            __shared__ float4 biases[kQuarters][kThreads];  // every thread reads what it wrote itself
            float numbers[kValues];
#pragma unroll
            for (int i = 0; i < kValues; ++i) {
                numbers[i] = finish.bias ? to_float(finish.bias[channel + i]) * finish.gain : 0.0f;
            }
#pragma unroll
            for (int i = 0; i < kQuarters; ++i) {
                const float* from = numbers + 4 * i;
                biases[i][threadIdx.x] = make_float4(from[0], from[1], from[2], from[3]);
            }
            bias = shared_address(&biases[0][threadIdx.x]);
        }
        if constexpr (kNoise) {
            factor = finish.strength ? to_float(*finish.strength) * finish.gain : finish.gain;
            noise_rows = stored, noise_row = g.ow;
            noise = finish.noise + sample * finish.noise_stride +
                    static_cast<std::int64_t>(at.band) * g.rows * g.ow + column;
#pragma unroll
            for (int i = 0; i < kAhead; ++i) load_noise(ahead[i]);
        }
    }
    __device__ __forceinline__ void load_noise(T (&numbers)[kOut]) {
#pragma unroll
        for (int i = 0; i < kOut; ++i) {
            numbers[i] = from_float<T>(0.0f);
            if (noise_rows > 0 && out[i]) numbers[i] = noise[i];
        }
        noise += noise_row, --noise_rows;
    }
    template <int r>
    __device__ __forceinline__ void sums_begin(float (&begin)[kOut][kValues]) {
        float biases[kValues];
        if constexpr (kValues == 1) {
            biases[0] = single;
        } else {
#pragma unroll
            for (int i = 0; i < kQuarters; ++i) {
                float* to = biases + 4 * i;
                asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                             : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3])
                             : "r"(bias + i * kThreads * 16)
                             : "memory");
            }
        }
#pragma unroll
        for (int p = 0; p < kOut; ++p) {
#pragma unroll
            for (int q = 0; q < kValues; ++q) {
                begin[p][q] = kNoise ? fmaf(to_float(ahead[r % kAhead][p]), factor, biases[q]) : biases[q];
            }
        }
        if constexpr (kNoise) load_noise(ahead[r % kAhead]);
    }
    __device__ __forceinline__ void store(int number, const float (&sums)[kOut][kValues]) {
        const bool wanted = static_cast<unsigned>(number) < static_cast<unsigned>(stored);
#pragma unroll
        for (int p = 0; p < kOut; ++p) {
            float values[kValues];
#pragma unroll
            for (int q = 0; q < kValues; ++q) values[q] = fmaxf(sums[p][q], slope * sums[p][q]);
            if constexpr (kValues == 1) {
                if (wanted && out[p]) y[p * c] = from_float<T>(limited(values[0], clamp));
            } else {
                Bytes16 bytes = pack<T>(values);
                bytes.x = limited_word<T>(bytes.x, clamp), bytes.y = limited_word<T>(bytes.y, clamp);
                bytes.z = limited_word<T>(bytes.z, clamp), bytes.w = limited_word<T>(bytes.w, clamp);
                if (wanted && out[p]) store16(y + p * c, bytes);
            }
        }
        y += out_row;
    }
};

}  // namespace clone_fast::fir

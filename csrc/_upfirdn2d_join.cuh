// Windows of upfirdn2d's fast kernels whose output stays in registers: the gradient of an image that goes two ways, of
// which one halves it, on through the activation and the 1x1 convolution of few inputs that made the image.
#pragma once

#include "_upfirdn2d_gate.cuh"

namespace clone_fast::fir {

// The output has O channels, all of them in one split; what the convolution read has kInputs, in channels_last, too.
template <typename T>
struct Joining {
    const T* other;      // the gradient that came the other way, as the output lies
    const T* result;     // of the activation, likewise
    float gain, slope;   // what the gradient is multiplied by, and where the result is not above zero by both
    float limit;         // where the result is beyond it there is no gradient; infinity: none
    const T* inputs;     // [n, oh, ow, kInputs]
    const T* weight;     // of output o and input i at o * weight_o + i * weight_i
    int weight_o, weight_i;
    T* of_inputs;        // like inputs; null: not wanted, as what follows
    float* of_weight;    // [n, bands, strips, kInputs, O]
    float* of_bias;      // [n, bands, strips, O]
};

// A row of what is added and one of results wait in shared memory, each thread's own, two pairs of rows behind the image;
// the next one comes where the one before was read, and needs no barrier. The inputs wait in registers, a row ahead.
// The gain is not in what the thread adds up, but in the weights and in the sums once they are done.
template <typename T, int kInputs>
struct Joined : Vectors<T, 2, 1, true, false> {
    using Base = Vectors<T, 2, 1, true, false>;
    using Base::c, Base::kIn, Base::kOut, Base::kV, Base::out, Base::out_row, Base::skipped, Base::stored;
    using Values = float[kOut][kV];
    static constexpr int kLead = 2;   // rows of output that are begun outside the band
    static constexpr int kAhead = 4;  // rows
    static constexpr int kBetween = kOut * kThreads * 16, kRowBytes = 2 * kBetween;  // from the one image to the other
    static_assert(kIn == kOut && kOut == 2 && kGroup <= 2, "the waits below count groups");

    static int shared_bytes(const Grid& g) {
        return Base::shared_bytes(g) + kAhead * kRowBytes + kInputs * kV * 4 * static_cast<int>(g.vectors.divisor);
    }

    const Joining<T>& branching;
    std::uint32_t images, weights;  // in shared memory: this thread's; of its channels, in fours
    int ahead, pixel;               // of this thread's first column: in the row that is copied next; in the next one
    int vector, vectors, width;
    T level[kOut * kInputs];
    float of_weight[kInputs][kV] = {}, of_bias[kV] = {};

    __device__ __forceinline__ Joined(const Grid& g, const Place& at, const T* x, const Joining<T>& branching_)
        : Base(g, at, x, nullptr, kLead), branching(branching_), vector(at.vector), vectors(g.vectors.divisor),
          width(g.ow) {
        extern __shared__ Bytes16 ring[];
        images = shared_address(ring) + this->wrap + threadIdx.x * 16;
        weights = shared_address(ring) + this->wrap + kAhead * kRowBytes + vector * 16;
        const int row = static_cast<int>(at.image * g.oh + at.band * g.rows * 2) + g.start_y;
        const int column = static_cast<int>(at.strip * g.columns + at.group) * kOut + g.start_x;
        ahead = (row * width + column) * c + vector * kV, pixel = (row - kLead) * width + column;
#pragma unroll
        for (int i = 0; i < kOut * kInputs; ++i) level[i] = from_float<T>(0.0f);
    }
    __device__ __forceinline__ void begin() {
        // [kInputs, fours of a vector, vectors, 4], which a warp reads without conflicts, behind the first barrier
        extern __shared__ Bytes16 ring[];
        float* all = reinterpret_cast<float*>(ring) + (this->wrap + kAhead * kRowBytes) / 4;
        for (int i = threadIdx.x; i < kInputs * c; i += kThreads) {
            const int output = i % c, four = output % kV / 4, input = i / c;
            all[((input * (kV / 4) + four) * vectors + output / kV) * 4 + output % 4] =
                branching.gain * to_float(branching.weight[output * branching.weight_o + input * branching.weight_i]);
        }
#pragma unroll
        for (int number = 0; number < kAhead - kLead; ++number) copy_images(number + kLead, number);
        Base::begin();
    }
    __device__ __forceinline__ bool is_wanted(int number) const {
        return static_cast<unsigned>(number - skipped) < static_cast<unsigned>(stored);
    }
    // Of the row of output of this number, in which `ahead` is.
    __device__ __forceinline__ void copy_images(int slot, int number) {
        const bool wanted = is_wanted(number);
#pragma unroll
        for (int p = 0; p < kOut; ++p) {
            const std::uint32_t to = images + slot * kRowBytes + p * kThreads * 16;
            copy16_async(to, branching.other + (ahead + p * c), wanted && out[p]);
            copy16_async(to + kBetween, branching.result + (ahead + p * c), wanted && out[p]);
        }
        ahead += out_row;
    }
    // Of the next row of output, whose number this is.
    __device__ __forceinline__ void load_inputs(int number) {
        const bool wanted = is_wanted(number);
#pragma unroll
        for (int i = 0; i < kOut * kInputs; ++i) {
            level[i] = from_float<T>(0.0f);
            if (wanted && out[i / kInputs]) level[i] = __ldg(branching.inputs + (pixel + width) * kInputs + i);
        }
    }
    template <int u>
    __device__ __forceinline__ void row_into(Values& window) {
        end_copies();  // of the row before; those of the one before that are read in this row
        if constexpr (u % kGroup == 0) {
            wait_for_copies<1>();
            __syncthreads();  // everybody's copies have come, and nobody reads the rows that are overwritten next
            Base::copy_rows();
        } else {
            wait_for_copies<2>();
        }
        Base::template read_row<u>(window);
    }
    __device__ __forceinline__ std::uint32_t waiting(int number, int p) const {
        return images + (number + kLead) % kAhead * kRowBytes + p * kThreads * 16;
    }
    // What the sums of this row of output begin with.
    __device__ __forceinline__ void begin_sums(int number, Values& sums) const {
#pragma unroll
        for (int p = 0; p < kOut; ++p) unpack<T>(load_shared16(waiting(number, p)), sums[p]);
    }
    // Of the sums of a row of output: their gradient to what comes before the activation, and what that is summed up for.
    __device__ __forceinline__ void finish(int number, Values& values) {
        const bool wanted = is_wanted(number);
        Values seen;
        float sizes = 0.0f;
#pragma unroll
        for (int p = 0; p < kOut; ++p) {
            unpack<T>(load_shared16(waiting(number, p) + kBetween), seen[p]);
#pragma unroll
            for (int q = 0; q < kV; ++q) {
                values[p][q] = sloped(values[p][q], seen[p][q], branching.slope);
                sizes += fabsf(seen[p][q]);
            }
        }
        // rare, and so asked of all at once: what is beyond the limit, is NaN or not there, and does not count
        if (!(wanted && out[0] && out[1] && sizes <= branching.limit)) {
#pragma unroll
            for (int i = 0; i < kOut * kV; ++i) {
                const int p = i / kV, q = i % kV;
                if (!(wanted && out[p] && fabsf(seen[p][q]) <= branching.limit)) values[p][q] = 0.0f;
            }
        }
#pragma unroll
        for (int i = 0; i < kOut * kV; ++i) of_bias[i % kV] += values[i / kV][i % kV];
        copy_images((number + kLead) % kAhead, number + kAhead);
        if (branching.of_weight) {
#pragma unroll
            for (int i = 0; i < kOut * kInputs; ++i) {
                const float input = to_float(level[i]);
#pragma unroll
                for (int q = 0; q < kV; ++q)
                    of_weight[i % kInputs][q] = fmaf(values[i / kInputs][q], input, of_weight[i % kInputs][q]);
            }
            load_inputs(number + 1);
        }
        if (branching.of_inputs) store_inputs(wanted, values);
        pixel += width;
    }
    // The products of a thread are a part of the sums of two pixels, whose threads have the other parts: half of these
    // threads go on with the one pixel, half with the other.
    __device__ __forceinline__ void store_inputs(bool wanted, const Values& values) {
        float products[kOut][kInputs] = {};
#pragma unroll
        for (int i = 0; i < kInputs; ++i) {
#pragma unroll
            for (int four = 0; four < kV / 4; ++four) {
                float weight[4];
                unpack<float>(load_shared16(weights + (i * (kV / 4) + four) * vectors * 16), weight);
#pragma unroll
                for (int j = 0; j < kOut * 4; ++j)
                    products[j / 4][i] = fmaf(weight[j % 4], values[j / 4][4 * four + j % 4], products[j / 4][i]);
            }
        }
        if (vectors == 1) {
#pragma unroll
            for (int p = 0; p < kOut; ++p) put(p, wanted && out[p], products[p], 0, 1);
            return;
        }
        const int half = vectors / 2;
        const bool second = vector >= half;
        float sums[kInputs];
#pragma unroll
        for (int i = 0; i < kInputs; ++i) {
            const float theirs = second ? products[0][i] : products[1][i];
            sums[i] = (second ? products[1][i] : products[0][i]) + __shfl_xor_sync(kWarp, theirs, half);
        }
        for (int offset = half / 2; offset > 0; offset /= 2) {
#pragma unroll
            for (int i = 0; i < kInputs; ++i) sums[i] += __shfl_xor_sync(kWarp, sums[i], offset);
        }
        put(second, wanted && (second ? out[1] : out[0]), sums, vector & (half - 1), half);
    }
    // Where several threads have a pixel's numbers, two of them store these in pairs.
    __device__ __forceinline__ void put(int column, bool there, const float (&sums)[kInputs], int thread, int threads) {
        T* to = branching.of_inputs + (pixel + column) * kInputs;
        if (threads == 1) {
#pragma unroll
            for (int i = 0; i < kInputs; ++i)
                if (there) to[i] = from_float<T>(sums[i]);
            return;
        }
#pragma unroll
        for (int i = 0; i < kInputs; i += 2) {
            constexpr int kLast = kInputs - 1;
            const float sum = thread == 0 ? sums[i] : sums[i < kLast ? i + 1 : kLast];
            if (there && thread < (i < kLast ? 2 : 1)) to[i + thread] = from_float<T>(sum);
        }
    }
    __device__ __forceinline__ void end(const Grid& g) {
        wait_for_copies<0>();  // into memory that is used again
#pragma unroll
        for (int q = 0; q < kV; ++q) of_bias[q] *= branching.gain;
        if (branching.of_bias) add_up(of_bias, g, branching.of_bias);
        if (!branching.of_weight) return;
#pragma unroll
        for (int i = 0; i < kInputs; ++i) {
#pragma unroll
            for (int q = 0; q < kV; ++q) of_weight[i][q] *= branching.gain;
            add_up(of_weight[i], g, branching.of_weight + i * c, kInputs);
        }
    }
};

// `Up` of these windows, whose sums begin with what is added; and of a separable filter, of whose rows those wait that
// have been filtered already.
template <class Windows>
struct Doubled {
    using Values = typename Windows::Values;
    static constexpr int kV = Windows::kV;
    Values rows[2] = {};  // of input

    __device__ __forceinline__ static void enter(const Dense&, const Values& window, Values& row) {
#pragma unroll
        for (int i = 0; i < 2 * kV; ++i) row[i / kV][i % kV] = window[i / kV][i % kV];
    }
    __device__ __forceinline__ static void enter(const Separable& f, const Values& window, Values& row) {
#pragma unroll
        for (int i = 0; i < 2 * kV; ++i) {
            const int p = i / kV, q = i % kV;
            row[p][q] = fmaf(f.x[3 - p], window[1][q], f.x[1 - p] * window[0][q]);
        }
    }
    __device__ __forceinline__ static void add(const Dense& f, int ky, const Values& row, Values& sums) {
#pragma unroll
        for (int i = 0; i < 2 * kV; ++i) {
            const int p = i / kV, q = i % kV;
            sums[p][q] = fmaf(f.tap[ky][3 - p], row[1][q], fmaf(f.tap[ky][1 - p], row[0][q], sums[p][q]));
        }
    }
    __device__ __forceinline__ static void add(const Separable& f, int ky, const Values& row, Values& sums) {
#pragma unroll
        for (int i = 0; i < 2 * kV; ++i) sums[i / kV][i % kV] = fmaf(f.y[ky], row[i / kV][i % kV], sums[i / kV][i % kV]);
    }
    template <int r, class Filter>
    __device__ __forceinline__ void row(Windows& at, const Filter& f, int first) {
        Values window;
        at.template row_into<r>(window);
        enter(f, window, rows[r]);
#pragma unroll
        for (int lower = 0; lower < 2; ++lower) {
            const int number = 2 * (first + r) + lower - Windows::kLead;
            Values sums;
            at.begin_sums(number, sums);
            add(f, 1 - lower, rows[1 - r], sums), add(f, 3 - lower, rows[r], sums);
            at.finish(number, sums);
        }
    }
    template <class Filter>
    __device__ __forceinline__ void slide(Windows& at, const Filter& f, const Grid& g) {
        for (int first = 0; first <= g.rows; first += 2) {
            row<0>(at, f, first);
            row<1>(at, f, first);
        }
    }
};

template <typename T, int kInputs>
__global__ void __launch_bounds__(kThreads, kInputs == 4 ? 2 : 3)  // for the sums of more blocks registers have no room
    join_kernel(const T* __restrict__ x, const float* __restrict__ f, const __grid_constant__ Grid g,
                  const __grid_constant__ Joining<T> branching) {
    using Windows = Joined<T, kInputs>;
    const Place place(g);
    Windows at(g, place, x, branching);
    wait_for_previous();
    at.begin();
    const Separable separable(f, g);
    if (separable.exact) Doubled<Windows>{}.slide(at, separable, g);
    else Doubled<Windows>{}.slide(at, Dense(f, g), g);
    at.end(g);
}

}  // namespace clone_fast::fir

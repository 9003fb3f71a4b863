// Where a discriminator begins, in one pass: a 1x1 convolution of few channels with its bias, activation and clamp, and
// its result with a 4x4 filter to half the size, in channels_last.
//
// A thread makes two neighbouring columns of pixels, a vector of channels of each, and slides down: rows 2i - 1 and 2i
// begin the sums of output row i and end those of the row above, and the thread's columns 2j - 1 and 2j are the left
// half of output column j and the right half of the one before, which goes to the neighbour through shared memory. A
// pixel below two bands or strips is made in both, and stored by the second of them.
#pragma once

#include "_upfirdn2d_finish.cuh"

namespace clone_fast::fir {

template <typename T>
struct Branching {
    const T* x;        // [n, h, w, inputs]
    const T* weight;   // channel o of input i at o * weight_o + i * weight_i
    const void* bias;  // [c], float where bias_float, else T; null: none
    T* y;              // [n, h, w, c]
    T* shrunk;         // [n, oh, ow, c]
    std::int64_t weight_o, weight_i;
    bool bias_float;
    float gain, slope;  // above zero; at most 1, what the activation multiplies numbers below zero by
    float clamp;        // infinity: none
};

// The sums of what the filter makes of rows 2i - 1 and 2i, for a vector of channels. Where the filter is a product they
// run down the two columns, and end as what Dense has from the beginning: [0] the left half of the thread's own output,
// [1] the right half of the one before.
template <int kV>
using Halves = float[2][kV];

template <int half, int p, int kV>
__device__ __forceinline__ void add_pixel(const Separable& f, const float (&values)[kV], Halves<kV>& begun,
                                          Halves<kV>& ended) {
#pragma unroll
    for (int q = 0; q < kV; ++q) {
        begun[p][q] = half == 0 ? f.y[0] * values[q] : fmaf(f.y[1], values[q], begun[p][q]);
        ended[p][q] = fmaf(f.y[2 + half], values[q], ended[p][q]);
    }
}
template <int half, int p, int kV>
__device__ __forceinline__ void add_pixel(const Dense& f, const float (&values)[kV], Halves<kV>& begun,
                                          Halves<kV>& ended) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
#pragma unroll
        for (int q = 0; q < kV; ++q) {
            begun[k][q] = half + p == 0 ? f.tap[0][2 * k] * values[q]
                                        : fmaf(f.tap[half][2 * k + p], values[q], begun[k][q]);
            ended[k][q] = fmaf(f.tap[2 + half][2 * k + p], values[q], ended[k][q]);
        }
    }
}

template <int kV>
__device__ __forceinline__ void end_sums(const Separable& f, Halves<kV>& ended) {
#pragma unroll
    for (int q = 0; q < kV; ++q) {
        const float left = ended[0][q], right = ended[1][q];
        ended[0][q] = fmaf(f.x[1], right, f.x[0] * left);
        ended[1][q] = fmaf(f.x[3], right, f.x[2] * left);
    }
}
template <int kV>
__device__ __forceinline__ void end_sums(const Dense&, Halves<kV>&) {}

// Without the taps of a column, 0 or 1, that lies outside the image.
__device__ __forceinline__ void leave_out(Separable& f, int p) { f.x[p] = f.x[2 + p] = 0.0f; }
__device__ __forceinline__ void leave_out(Dense& f, int p) {
#pragma unroll
    for (int k = 0; k < 4; ++k) f.tap[k][p] = f.tap[k][2 + p] = 0.0f;
}

template <typename T, int kInputs>
struct Branch {
    static constexpr int kV = kLanes<T>, kQuarters = kV / 4;

    const Branching<T>& all;
    int x, y, shrunk;  // where in them the first column is: of the next row to be loaded, the next to be made, and the
                       // output row that is stored next
    T ahead[2][2][kInputs] = {};  // the pixels of rows 2i - 1 and 2i
    float weights[kInputs][kV], bias[kV];
    Halves<kV> sums[2] = {};       // of the output row that is begun and the one above, which take turns
    int row, end;                  // the next row to be made; where those end that are stored here
    int number, rows;              // of the output row that is stored next, in the band; how many the band has
    int h, w, c, vectors, out_row;
    bool in[2], own[2], receives;  // columns in the image, and stored here; whether it stores an output column

    __device__ Branch(const Grid& g, const Place& at, const Branching<T>& all_) : all(all_) {
        h = g.h, w = g.w, c = g.c, vectors = g.vectors.divisor, out_row = g.ow * c;
        const int first = static_cast<int>(at.strip) * g.columns, columns = min(g.columns, g.ow - first);
        const int column = 2 * (first + at.group) - 1;
        const int columns_end = first + columns == g.ow ? w : 2 * (first + columns) - 1;
        const bool works = at.works && at.group <= columns;
#pragma unroll
        for (int p = 0; p < 2; ++p) {
            in[p] = works && column + p >= 0 && column + p < w;
            own[p] = in[p] && column + p < columns_end;
        }
        receives = works && at.group < columns;
        const int band = static_cast<int>(at.band) * g.rows;
        rows = min(g.rows, g.oh - band), number = -1;
        end = band + rows == g.oh ? h : 2 * (band + rows) - 1;
        row = 2 * band - 1;
        const int channel = (static_cast<int>(at.split * g.vectors.divisor) + at.vector) * kV;
        const int pixel = (static_cast<int>(at.image) * h + row) * w + column;
        x = (pixel + (row < 0 ? w : 0)) * kInputs, y = pixel * c + channel;
        shrunk = ((static_cast<int>(at.image) * g.oh + band - 1) * g.ow + first + at.group) * c + channel;
#pragma unroll
        for (int q = 0; q < kV; ++q) {
            bias[q] = 0.0f;
            if (all.bias)
                bias[q] = all.gain * (all.bias_float ? static_cast<const float*>(all.bias)[channel + q]
                                                     : to_float(static_cast<const T*>(all.bias)[channel + q]));
#pragma unroll
            for (int i = 0; i < kInputs; ++i)
                weights[i][q] = all.gain * to_float(all.weight[(channel + q) * all.weight_o + i * all.weight_i]);
        }
        load(ahead[0], row), load(ahead[1], row + 1);
    }
    // The next row, or the same one again where that is in no window. A column outside the image stays what it is.
    __device__ __forceinline__ void load(T (&pixels)[2][kInputs], int loaded) {
#pragma unroll
        for (int p = 0; p < 2; ++p) {
#pragma unroll
            for (int i = 0; i < kInputs; ++i)
                if (in[p]) pixels[p][i] = all.x[x + p * kInputs + i];
        }
        if (static_cast<unsigned>(loaded) < static_cast<unsigned>(h - 1)) x += w * kInputs;
    }
    // Stored, and with the rounding of that in float32 for the filter.
    __device__ __forceinline__ void make(const float (&pixel)[kInputs], int p, float (&values)[kV]) {
#pragma unroll
        for (int q = 0; q < kV; ++q) {
            float z = bias[q];
#pragma unroll
            for (int i = 0; i < kInputs; ++i) z = fmaf(weights[i][q], pixel[i], z);
            values[q] = fmaxf(z, all.slope * z);
        }
        Bytes16 bytes = pack<T>(values);
        bytes.x = limited_word<T>(bytes.x, all.clamp), bytes.y = limited_word<T>(bytes.y, all.clamp);
        bytes.z = limited_word<T>(bytes.z, all.clamp), bytes.w = limited_word<T>(bytes.w, all.clamp);
        if (own[p] && row < end) store16(all.y + (y + p * c), bytes);
        unpack<T>(bytes, values);
    }
    template <int half, class Filter>
    __device__ __forceinline__ void add_row(const Filter& f, Halves<kV>& begun, Halves<kV>& ended) {
        float pixels[2][kInputs];
#pragma unroll
        for (int p = 0; p < 2; ++p) {
#pragma unroll
            for (int i = 0; i < kInputs; ++i) pixels[p][i] = to_float(ahead[half][p][i]);
        }
        load(ahead[half], row + 2);
        if (static_cast<unsigned>(row) < static_cast<unsigned>(h)) {
            float values[kV];
            make(pixels[0], 0, values), add_pixel<half, 0>(f, values, begun, ended);
            make(pixels[1], 1, values), add_pixel<half, 1>(f, values, begun, ended);
        }  // else it begins a band, with sums that are zero, or ends it
        y += w * c, ++row;
    }
    // What threads hand over, of odd output rows and of even ones: read before the next barrier, overwritten behind it.
    __device__ __forceinline__ static float4& handed(int odd, int quarter, int thread) {
        __shared__ float4 sums[2][kQuarters][kThreads];
        return sums[odd][quarter][thread];
    }
    // Rows 2i - 1 and 2i, i odd or even; all threads of the block together.
    template <int odd, class Filter>
    __device__ __forceinline__ void add_pair(const Filter& f) {
        Halves<kV>& begun = sums[odd];
        Halves<kV>& ended = sums[1 - odd];
        add_row<0>(f, begun, ended);
        add_row<1>(f, begun, ended);
        end_sums(f, ended);
#pragma unroll
        for (int i = 0; i < kQuarters; ++i) {
            const float* from = ended[1] + 4 * i;
            handed(odd, i, threadIdx.x) = make_float4(from[0], from[1], from[2], from[3]);
        }
        __syncthreads();
        if (receives && static_cast<unsigned>(number) < static_cast<unsigned>(rows)) {
            float values[kV];
#pragma unroll
            for (int i = 0; i < kQuarters; ++i) {
                const float4 right = handed(odd, i, threadIdx.x + vectors);
                values[4 * i] = ended[0][4 * i] + right.x, values[4 * i + 1] = ended[0][4 * i + 1] + right.y;
                values[4 * i + 2] = ended[0][4 * i + 2] + right.z, values[4 * i + 3] = ended[0][4 * i + 3] + right.w;
            }
            store16(all.shrunk + shrunk, pack<T>(values));
        }
        shrunk += out_row, ++number;
    }
    template <class Filter>
    __device__ __forceinline__ void slide(Filter f, int pairs) {
#pragma unroll
        for (int p = 0; p < 2; ++p)
            if (!in[p]) leave_out(f, p);
        for (int i = 0; i < pairs; i += 2) add_pair<0>(f), add_pair<1>(f);
    }
};

template <typename T, int kInputs>
__global__ void __launch_bounds__(kThreads, kInputs * kLanes<T> > 24 ? 3 : kBlocks)  // as the registers have room
    branch_kernel(const float* __restrict__ f, const __grid_constant__ Grid g,
                  const __grid_constant__ Branching<T> branching) {
    const Place place(g);
    wait_for_previous();
    Branch<T, kInputs> at(g, place, branching);
    const Separable separable(f, g);
    if (separable.exact) at.slide(separable, g.rows + 1);
    else at.slide(Dense(f, g), g.rows + 1);
}

}  // namespace clone_fast::fir

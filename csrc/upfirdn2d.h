// upfirdn2d: insert zeros, pad, filter with a FIR, decimate. Semantics: clone_fast/reference/upfirdn2d.py.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

#include "dtype.h"

namespace clone_fast {

struct Upfirdn2d {
    int n, c, h, w;           // x [n, c, h, w], dense
    int oh, ow;               // y [n, c, oh, ow], dense in the same layout
    bool channels_last;       // memory order n, h, w, c; else n, c, h, w
    int fh, fw;               // f [fh, fw]; or, where separable, [fh] with fh == fw, meaning its outer product
    bool separable;
    int up_x, up_y, down_x, down_y;
    int pad_x, pad_y;         // before the image, in upsampled samples; those after it follow from oh and ow
    bool flip;                // correlate instead of convolve
    float gain;
};

// x and y of x_dtype and y_dtype: equal, or one of them float32 (a pass of a separable filter). f float32.
void upfirdn2d(Dtype x_dtype, const void* x, const float* f, Dtype y_dtype, void* y, const Upfirdn2d& args,
               cudaStream_t stream);

// y = clamp(gain * act(the filtered + noise * strength + bias)): what follows a convolution. All tensors in x's dtype.
struct Upfirdn2dFinish {
    const void* noise;     // [oh, ow], sample n at n * noise_stride elements; null: none
    const void* strength;  // its factor, one number; null: 1
    const void* bias;      // [c]; null: none
    std::int64_t noise_stride;
    float gain, slope;  // above zero; at most 1, what the activation multiplies numbers below zero by
    float clamp;        // infinity: none
};

// A 4x4 filter without resampling, and the rest in the same pass.
void upfirdn2d_finish(Dtype dtype, const void* x, const float* f, void* y, Upfirdn2d args,
                      const Upfirdn2dFinish& finish, cudaStream_t stream);

// The gradient of y = clamp(gain * act(z)) to z in place of x, which is that to y; and its sums. Tensors in x's dtype,
// sums in float32, and null where they are not wanted.
struct Upfirdn2dGate {
    const void* result;    // y, of x's size and layout
    const void* noise;     // [h, w], sample n at n * noise_stride elements: what z contains of it; null: none is read
    const void* strength;  // its factor, one number; null: 1
    const void* bias;      // [c], what z contains of it, for the dots; null: none
    std::int64_t noise_stride;
    float gain, slope;  // slope: what the activation multiplies numbers below zero by
    float limit;        // the largest |y| below the clamp, a number of the dtype; infinity: none
    float *of_bias, *of_dots;  // [n, rows, c], over the pixels: of it, and of it times z without bias and noise
    float* of_strength;        // [blocks], over all, times the noise
};

// A 4x4 filter without resampling of that, channels_last in vectors of 16 bytes, to an image that is no smaller; and
// how many (rows, blocks) of sums it makes, with these or without.
void upfirdn2d_gate(Dtype dtype, const void* x, const float* f, void* y, const Upfirdn2d& args,
                    const Upfirdn2dGate& gate, cudaStream_t stream);
std::pair<int, int> upfirdn2d_gate_sums(Dtype dtype, const Upfirdn2d& args, bool noise, bool dots);

// What is filtered times the slope of y = clamp(gain * act(z)), read off y: the gradient to z, where x filtered is that to
// y. Tensors in x's dtype.
struct Upfirdn2dSlope {
    const void* result;  // y, of the result's size and layout
    float gain, slope;   // slope: what the activation multiplies numbers below zero by
    float limit;         // the largest |y| below the clamp, a number of the dtype; infinity: none
    float* of_bias;      // [n, rows, c], sums over the pixels, in float32; null: not wanted
};

// A 4x4 filter without resampling and that behind it, channels_last in vectors of 16 bytes; and how many rows of sums it
// makes.
void upfirdn2d_slope(Dtype dtype, const void* x, const float* f, void* y, const Upfirdn2d& args,
                     const Upfirdn2dSlope& slope, cudaStream_t stream);
int upfirdn2d_slope_sums(Dtype dtype, const Upfirdn2d& args);

// y = clamp(gain * act(w x + bias)), a 1x1 convolution of x [n, inputs, h, w], dense in channels_last; and beside it
// what is filtered, y of [n, c, h, w], at half the size.
struct Upfirdn2dBranch {
    int inputs;          // 1 to 4
    const void* weight;  // [c, inputs] with these strides
    std::int64_t weight_o, weight_i;
    const void* bias;    // [c], float where bias_float, else of the dtype; null: none
    bool bias_float;
    void* shrunk;        // [n, c, oh, ow]
    float gain, slope;   // above zero; at most 1, what the activation multiplies numbers below zero by
    float clamp;         // infinity: none
};

// A 4x4 filter of y, rounded, with down 2 and padding 1 before it, to half its size, channels_last in vectors of 16
// bytes.
void upfirdn2d_branch(Dtype dtype, const void* x, const float* f, void* y, const Upfirdn2d& args,
                      const Upfirdn2dBranch& branch, cudaStream_t stream);

// Of y = clamp(gain * act(1x1 convolution of few inputs)), where what is filtered, plus `other`, is the gradient to y: the
// gradients that the convolution has of it. Images in x's dtype and channels_last, sums in float32.
struct Upfirdn2dJoin {
    const void* other;   // [n, c, oh, ow]
    const void* result;  // y, likewise
    float gain, slope;   // slope: what the activation multiplies numbers below zero by
    float limit;         // the largest |y| below the clamp, a number of the dtype; infinity: none
    int inputs;          // 1 to 4
    const void* input;   // [n, inputs, oh, ow]
    const void* weight;  // of output o and input i at o * weight_o + i * weight_i, in x's dtype
    int weight_o, weight_i;
    void* of_input;    // like input; null: not wanted, as of what follows
    float* of_weight;  // [n, rows, inputs, c], sums over the pixels
    float* of_bias;    // [n, rows, c], likewise
};

// With a 4x4 filter, up 2 and down 1, of 8, 16, 32 or 64 channels; and how many rows of sums it makes.
void upfirdn2d_join(Dtype dtype, const void* x, const float* f, const Upfirdn2d& args, const Upfirdn2dJoin& join,
                    cudaStream_t stream);
int upfirdn2d_join_sums(Dtype dtype, const Upfirdn2d& args, int inputs);

// With a 4x4 filter, up 2 and down 1, plus `other` [n, c, oh, ow], dense in the layout of x, of x's dtype or, where
// that is float32, of any. What is added to float32 in NCHW may be in channels_last.
void upfirdn2d_add(Dtype x_dtype, const void* x, const float* f, Dtype other_dtype, const void* other,
                   bool other_channels_last, void* y, const Upfirdn2d& args, cudaStream_t stream);

}  // namespace clone_fast

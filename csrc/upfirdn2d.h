// upfirdn2d: insert zeros, pad, filter with a FIR, decimate. Semantics: clone_fast/reference/upfirdn2d.py.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

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

// With a 4x4 filter, up 2 and down 1, plus `other` [n, c, oh, ow], dense in the layout of x, of x's dtype or, where
// that is float32, of any. What is added to float32 in NCHW may be in channels_last.
void upfirdn2d_add(Dtype x_dtype, const void* x, const float* f, Dtype other_dtype, const void* other,
                   bool other_channels_last, void* y, const Upfirdn2d& args, cudaStream_t stream);

}  // namespace clone_fast

// upfirdn2d: insert zeros, pad, filter with a FIR, decimate. Semantics: clone_fast/reference/upfirdn2d.py.
#pragma once

#include <cuda_runtime.h>

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

}  // namespace clone_fast

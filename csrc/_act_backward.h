// What stands between the gradient of a modulated convolution's result and that of its convolution, in channels_last.
// Semantics: kernels/_act_backward.py.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "dtype.h"

namespace clone_fast {

// g = slope * (dy + w^T dimage), where slope is that of y = clamp(gain * act(z)) and is read off y. Tensors of dtype, the
// sums float32; each block writes sums of its own: `shares` of them for every sample, one after the other.
struct ActBackward {
    Dtype dtype;
    int n, channels, pixels;  // channels in whole 16 bytes, and not too many; pixels of a sample
    int shares;               // blocks of a sample
    int few;                  // channels of the image that is drawn of y: 0 (none) or 3
    const void* dy;           // [n, pixels, channels], or null: zeros
    const void* y;
    void* g;
    const void* noise;        // [pixels], sample n at n * noise_stride; null: none
    std::int64_t noise_stride;
    const void* strength;     // its factor, one number; null: 1
    const void* bias;         // [channels], for the dots; null: zeros
    const void* dimage;       // pixel p, channel f of sample n at n * few * pixels + p * image_pixel + f * image_channel
    int image_pixel, image_channel;
    const void* image;        // what was drawn: where |image| is not below image_clamp, dimage is 0; null: no clamp
    int drawn_pixel, drawn_channel;  // its strides, as of dimage
    float image_clamp;
    const void* w;            // channel f, c of sample n at n * w_n + f * w_f + c * w_c
    std::int64_t w_n, w_f, w_c;
    float positive, negative;  // the slope where y > 0, and elsewhere
    float clamp;               // from |y| = clamp on g is 0; NaN: none, since no comparison with it is true
    float* bias_sums;          // [n, shares, channels]: of g; null: not wanted, as all that follow
    float* strength_sums;      // [n, shares]: of g * noise
    float* dots;               // [n, shares, channels]: of dy y - g (noise * strength + bias), dy with what w brings
    float* w_sums;             // [n, shares, few, channels]: of dimage * y
    float* dimage_sums;        // [n, shares, few]
};

void act_backward(const ActBackward& op, cudaStream_t stream);

int act_backward_channels(Dtype dtype);  // at most

// How many blocks of a sample keep this device busy.
int act_backward_shares(Dtype dtype, int n, int channels, int pixels);

}  // namespace clone_fast

// modulated_conv2d with up = 2 or down = 2: StyleGAN2's resampling convolutions, each in one kernel.
// See _resampled_conv_up_sm90a.cu and _resampled_conv_down_sm90a.cu.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "dtype.h"

namespace clone_fast {

// Images are channels_last and dense on 16 bytes, channels are multiples of 16.
struct ResampledConv {
    Dtype dtype;  // float16 or bfloat16
    int n, height, width, in_channels, out_channels;
    const void* x;  // [N, H, W, I]
    const void* weight;  // [N or 1, 3, 3, O, I], dense
    void* y;  // [N, H', W', O]
    const float* filter;  // [4, 4], or [4] of a separable one
    const void* noise;  // [H', W'], sample n at n * noise_stride; null: none
    const void* strength;  // its factor, one number; null: 1
    const void* bias;  // [O]; null: none
    std::int64_t weight_stride, noise_stride;  // elements from sample to sample, 0: shared
    int filter_rank;  // 2 or 1
    int noise_float, strength_float, bias_float;  // 1: float32, 0: x's dtype
    float gain, slope;  // of the activation, and what it multiplies numbers below zero by
    float clamp;  // infinity: none
    void* filtered;  // for down = 2: [N, H + 1, W + 1, I], what the convolution reads; null: not wanted
};

// Compute capability 9.0 only, and at most 64 input channels.
void resampled_conv_up(const ResampledConv& op, cudaStream_t stream);

// Compute capability 9.0 only, 32 or 64 input channels, even height and width.
void resampled_conv_down(const ResampledConv& op, cudaStream_t stream);

}  // namespace clone_fast

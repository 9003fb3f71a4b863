// modulated_conv2d: the 3x3 convolution of few channels with everything fused, and its weight gradient.
// See _modulated_conv2d_tile.cuh for how it works.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "dtype.h"

namespace clone_fast {

// What is drawn of a result on its way to memory: rgb[f] = limited(bias[f] + sum of weight[f, c] * y[c]) at each pixel.
struct Drawing {
    int channels;  // F, 1 to 4; 0: nothing is drawn
    const void* weight;  // of sample n, channels f and c, at n*wn + f*wf + c*wc, in y's dtype
    const void* bias;  // [F]; null: none
    void* rgb;  // [N, H, W, F], in y's dtype
    std::int64_t wn, wf, wc;
    bool bias_float;  // float32, or else y's dtype
    float clamp;  // infinity: none
};

// What a launcher is told, all of it in elements. Images are channels_last and dense, channels are multiples of 8.
struct Conv3x3 {
    Dtype dtype;
    int n, height, width, in_channels, out_channels;
    const void* x;  // [N, H, W, I]
    const void* weight;  // tap (y, x) of sample n, channels o and i, at n*wn + o*wo + i*wi + y*wy + x*wx
    void* y;  // [N, H, W, O]
    const void* noise;  // [H, W], sample n at n * noise_stride; null: none
    const void* strength;  // its factor, one number; null: 1
    const void* bias;  // [O]; null: none
    std::int64_t wn, wo, wi, wy, wx, noise_stride;
    bool weight_rows;  // the input channels of a tap lie side by side, else the output channels; on 16 bytes
    bool noise_float, strength_float, bias_float;  // float32, or else x's dtype
    float positive, negative;  // gain, and gain times the slope below zero
    float clamp;  // infinity: none
    // for tests
    bool portable;  // mma.sync, also where there is something better
    int blocks;  // at most so many, which makes long walks of small images; 0: as many as run at once

    Drawing drawing = {};  // of the rounded y
};

// Throws above 64 channels, and for dtypes other than the two of 16 bits.
void modulated_conv2d_3x3(const Conv3x3& op, cudaStream_t stream);

// Whether the device has the instructions and the shared memory for so many channels.
bool modulated_conv2d_3x3_fits(int device, int in_channels, int out_channels);

// The same on the tensor cores' asynchronous instructions, compute capability 9.0 only: at most 32 channels on one side
// at least, and above 32 on both.
void modulated_conv2d_3x3_sm90a(const Conv3x3& op, cudaStream_t stream);
void modulated_conv2d_3x3_held(const Conv3x3& op, cudaStream_t stream);

// The weight gradient: y[r, dy, dx, cb, ca] = sum of b[n, p, cb] * a[n, p + (dy, dx) - 1, ca] over the pixels p of
// the n / results samples of every result.
struct Conv3x3Wgrad {
    Dtype dtype;
    int n, height, width, channels_a, channels_b;  // channels are multiples of 8, at most 64
    int results, partials;
    const void* a;  // [N, H, W, A], dense
    const void* b;  // [N, H, W, B], dense
    float* partial;  // [results, partials, modulated_conv2d_3x3_wgrad_floats]
    float* y;  // [results, 3, 3, B, A]
    bool portable;  // for tests: mma.sync, also where there is something better
};

bool modulated_conv2d_3x3_wgrad_fits(int device, int channels_a, int channels_b);

// How many partial sums there are to be for each result, on the current device.
int modulated_conv2d_3x3_wgrad_partials(int n, int height, int width, int results);

void modulated_conv2d_3x3_wgrad(const Conv3x3Wgrad& op, cudaStream_t stream);

// Of a partial sum, whose order is the kernel's own.
int modulated_conv2d_3x3_wgrad_floats(int channels_a, int channels_b);

// The same on wgmma, compute capability 9.0 only; both sides up to 32 channels, or both above.
void modulated_conv2d_3x3_wgrad_sm90a(const Conv3x3Wgrad& op, cudaStream_t stream);

}  // namespace clone_fast

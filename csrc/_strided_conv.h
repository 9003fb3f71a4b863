// The 3x3 convolution of stride 2 and its adjoint. See _strided_conv_sm90a.cuh for how it works.
#pragma once

#include <cuda_runtime.h>

#include "dtype.h"

namespace clone_fast {

// Images are channels_last and dense on 16 bytes; input channels are multiples of 8, output channels of 32.
struct StridedConv {
    Dtype dtype;  // float16 or bfloat16
    bool transposed;
    int n, height, width, in_channels;  // of x
    int out_height, out_width, out_channels;  // of y
    int padding;
    int results;  // n where every sample has weights of its own, else 1
    const void* x;  // [N, H, W, I]
    const void* weight;  // [results, 3, 3, O, I], dense
    void* y;  // [N, H', W', O]
    int tile;  // for tests: one of the tiles, in the order of the source; -1: the best
};

// Whether the device has the instructions, and the weights of so many channels find room in a block.
bool strided_conv_fits(int device, bool transposed, int in_channels, int out_channels);

// Compute capability 9.0 only.
void strided_conv(const StridedConv& op, cudaStream_t stream);

}  // namespace clone_fast

// laplacian_pyramid: the loss over the bands of a difference of two images, and its gradient. See laplacian_pyramid.cu.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "dtype.h"

namespace clone_fast {

// Strides in elements of an image [N, C, H, W].
struct ImageStrides {
    std::int64_t n, c, h, w;
};

// loss = sum_j weights[j] * mean rho(band j of x - y) + mse * mean (x - y)^2; the number of levels is that of the
// weights.
struct LaplacianPyramid {
    Dtype dtype;
    int samples, channels, height, width;
    std::vector<float> weights;
    float eps;   // of Charbonnier's rho(d) = sqrt(d^2 + eps^2); negative: rho(d) = |d|
    double mse;  // 0: no squares are summed

    bool absolute() const { return eps < 0; }
    bool squares() const { return mse > 0; }
};

// Bytes of workspace of a call of laplacian_pyramid; with slopes the inner levels keep theirs there.
std::int64_t laplacian_pyramid_workspace(const LaplacianPyramid& op, bool keep);

// Writes `loss`, one float32. `slope` and `coarse` are null, or what laplacian_pyramid_backward wants: rho' of the
// finest band [N, C, H, W], int8 for |d| and float32 for Charbonnier; d loss / d level 1 [N, C, ceil(H/2), ceil(W/2)],
// float32.
void laplacian_pyramid(const LaplacianPyramid& op, const void* x, const ImageStrides& x_strides, const void* y,
                       const ImageStrides& y_strides, float* loss, void* slope, float* coarse, void* workspace,
                       cudaStream_t stream);

// dx = dloss * d loss / d x from what the forward kept, and where op.squares() from x and y. It is written with its own
// strides.
void laplacian_pyramid_backward(const LaplacianPyramid& op, const float* dloss, const void* slope, const float* coarse,
                                const void* x, const ImageStrides& x_strides, const void* y,
                                const ImageStrides& y_strides, void* dx, const ImageStrides& dx_strides,
                                cudaStream_t stream);

}  // namespace clone_fast

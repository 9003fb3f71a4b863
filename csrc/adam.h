// adam: one step of Adam on many tensors at once, in place.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

namespace clone_fast {

// Everything is float32, and the four of a tensor lie in memory in the same order, without gaps.
struct AdamTensor {
    float* parameter;
    const float* gradient;
    float* mean;         // of the gradients
    float* square;       // mean of their squares
    const float* steps;  // a number, how many there were before this one; not counted on
    std::int64_t count;  // elements
};

// rate: a number. Betas in [0, 1), epsilon above 0.
void adam(const std::vector<AdamTensor>& tensors, const float* rate, double beta1, double beta2, double epsilon,
          cudaStream_t stream);

}  // namespace clone_fast

// styles: the affine layers of a generator, all in one launch, and their gradients.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

namespace clone_fast {

// Everything is float32. Rows of weights are dense, on 16 bytes, of `width` numbers, a multiple of 4.
struct Styles {
    int n, latents, width;
    const float* ws;  // latent l of sample i at i * sample_stride + l * latent_stride, on 16 bytes
    std::int64_t sample_stride, latent_stride;
    float gain;  // of the weights
    // of each layer
    std::vector<int> rows, reads;  // its styles; which latent it reads
    std::vector<float> factors;    // of its styles
};

// At most so many layers: their table is an argument of the kernel, and goes into a graph with it.
inline constexpr int kStyleLayers = 48;

// styles[l] [N, rows] = factor * (gain * ws[:, read] weights[l]^T + biases[l])
void styles(const Styles& op, const std::vector<const float*>& weights, const std::vector<const float*>& biases,
            const std::vector<float*>& styles, cudaStream_t stream);

// Of gradients[l] [N, rows], whose samples lie strides[l] apart: dweights[l] like weights[l] and dbiases[l] [rows], or
// none of them where the lists are empty; and dws [N, latents, width], dense, or null for none, by way of the workspace
// `partial` of that many floats. The order of summation is the same on every run.
void styles_backward(const Styles& op, const std::vector<const float*>& weights,
                     const std::vector<const float*>& gradients, const std::vector<std::int64_t>& strides,
                     const std::vector<float*>& dweights, const std::vector<float*>& dbiases, float* dws,
                     float* partial, cudaStream_t stream);
std::int64_t styles_partials(const Styles& op);

}  // namespace clone_fast

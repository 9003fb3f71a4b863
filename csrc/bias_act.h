// bias_act: clamp(gain * act(x + b)), its gradient, and the second gradient.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "dtype.h"

namespace clone_fast {

// The order of ACTIVATIONS in clone_fast/cuda/bias_act.py.
enum class Act : int { linear, relu, lrelu, tanh, sigmoid, elu, selu, softplus, swish };

// The memory of x, y, dx, ... is dense, of less than 2^31 elements, and seen as [outer, channels, inner]; the bias is
// [channels] or null.
struct BiasAct {
    Dtype dtype;
    std::int64_t outer, channels, inner;
    Act act;
    float alpha, gain;
    float clamp;  // NaN: none
};

// y = clamp(gain * act(x + b))
void bias_act(const BiasAct& op, const void* x, const void* b, void* y, cudaStream_t stream);

// dx = dy * slope(x + b), where slope is the derivative of the above.
void bias_act_gradient(const BiasAct& op, const void* dy, const void* x, const void* b, void* dx, cudaStream_t stream);

// The same, and db [channels] = the sum of dx, unrounded, over outer and inner, by way of the workspace `partial`: that
// many floats, and the same order of summation on every run.
void bias_act_gradients(const BiasAct& op, const void* dy, const void* x, const void* b, void* dx, void* db, float* partial,
                        cudaStream_t stream);
std::int64_t bias_act_partials(const BiasAct& op);

// result = v * dy * slope'(x + b)
void bias_act_second(const BiasAct& op, const void* v, const void* dy, const void* x, const void* b, void* result,
                     cudaStream_t stream);

}  // namespace clone_fast

// The formulas of bias_act, for the value z = x + b of one element, in float32.
//
// Kernels come in two kinds: kRectified has linear, relu and lrelu, which differ by the slope below 0 alone, as straight
// code; otherwise the activation is chosen at run time, by a branch that all threads take alike.
#pragma once

#include <cmath>

#include "bias_act.h"
#include "_ptx.cuh"

namespace clone_fast {

constexpr char kBiasAct[] = "bias_act";
constexpr float kSeluScale = 1.0507009873554804934f, kSeluAlpha = 1.6732632423543772848f;
constexpr float kSoftplusThreshold = 20.0f;  // from here on softplus(z) = z, as in PyTorch

struct Formula {
    Act act;
    float below;  // slope of the rectified kind for z < 0
    float gain;
    float clamp;  // NaN: none, since no comparison with it is true
    float limit;  // the same, but infinity: none

    explicit Formula(const BiasAct& op)
        : act(op.act), below(op.alpha), gain(op.gain), clamp(op.clamp), limit(std::isnan(op.clamp) ? INFINITY : op.clamp) {
        if (act == Act::linear) below = 1.0f;
        if (act == Act::relu) below = 0.0f;
    }

    static __host__ __device__ bool is_rectified(Act act) { return act == Act::linear || act == Act::relu || act == Act::lrelu; }
};

__device__ __forceinline__ float sigmoid(float z) { return __fdividef(1.0f, 1.0f + expf(-z)); }

// act(z)
template <bool kRectified>
__device__ __forceinline__ float activation(const Formula& f, float z) {
    if constexpr (kRectified) {
        const float low = f.below == 0.0f ? 0.0f : z * f.below;  // relu(-inf) is 0, not NaN
        return z < 0.0f ? low : z;
    }
    switch (f.act) {
        case Act::tanh: return tanhf(z);
        case Act::sigmoid: return sigmoid(z);
        case Act::elu: return z < 0.0f ? expm1f(z) : z;
        case Act::selu: return kSeluScale * (z < 0.0f ? kSeluAlpha * expm1f(z) : z);
        case Act::softplus: return z > kSoftplusThreshold ? z : log1pf(expf(z));
        case Act::swish: return z * sigmoid(z);
        default: return activation<true>(f, z);
    }
}

// d act / dz of what is not rectified
__device__ __forceinline__ float smooth_slope(const Formula& f, float z) {
    switch (f.act) {
        case Act::tanh: {
            const float t = tanhf(z);
            return 1.0f - t * t;
        }
        case Act::elu: return z <= 0.0f ? expf(z) : 1.0f;
        case Act::selu: return kSeluScale * (z <= 0.0f ? kSeluAlpha * expf(z) : 1.0f);
        case Act::softplus: return z > kSoftplusThreshold ? 1.0f : sigmoid(z);
        default: {
            const float s = sigmoid(z);
            return f.act == Act::swish ? s * (1.0f + z * (1.0f - s)) : s * (1.0f - s);
        }
    }
}

// d^2 act / dz^2, 0 for the rectified ones
__device__ __forceinline__ float curvature(const Formula& f, float z) {
    switch (f.act) {
        case Act::tanh: {
            const float t = tanhf(z);
            return -2.0f * t * (1.0f - t * t);
        }
        case Act::elu: return z < 0.0f ? expf(z) : 0.0f;
        case Act::selu: return z < 0.0f ? kSeluScale * kSeluAlpha * expf(z) : 0.0f;
        case Act::sigmoid:
        case Act::softplus:
        case Act::swish: {
            const float s = sigmoid(z), slope = s * (1.0f - s);
            if (f.act == Act::sigmoid) return slope * (1.0f - 2.0f * s);
            if (f.act == Act::swish) return slope * (2.0f + z * (1.0f - 2.0f * s));
            return z > kSoftplusThreshold ? 0.0f : slope;
        }
        default: return 0.0f;
    }
}

// Whether the value stands at the clamp or beyond, where no gradient passes.
template <bool kRectified>
__device__ __forceinline__ bool is_clamped(const Formula& f, float z) {
    if (!kRectified && isnan(f.clamp)) return false;  // spares the smooth ones an activation
    return fabsf(f.gain * activation<kRectified>(f, z)) >= f.clamp;
}

template <bool kRectified>
__device__ __forceinline__ float value(const Formula& f, float z) {
    return limited(f.gain * activation<kRectified>(f, z), f.limit);
}

// dy * d value / dz. Where the slope is 0 the result is, whatever dy holds.
template <bool kRectified>
__device__ __forceinline__ float gradient(const Formula& f, float dy, float z) {
    float dz = dy * f.gain;
    if (kRectified || Formula::is_rectified(f.act)) {
        // One comparison for the slope and for the value, which is 0 at 0 with either slope.
        const bool is_low = z <= 0.0f;
        const float low = f.below == 0.0f ? 0.0f : dz * f.below, value = f.below == 0.0f ? 0.0f : z * f.below;
        dz = is_low ? low : dz, z = is_low ? value : z;
        return fabsf(f.gain * z) >= f.clamp ? 0.0f : dz;
    }
    return is_clamped<kRectified>(f, z) ? 0.0f : dz * smooth_slope(f, z);
}

// v * dy * d^2 value / dz^2
__device__ __forceinline__ float second(const Formula& f, float v, float dy, float z) {
    return is_clamped<false>(f, z) ? 0.0f : v * dy * f.gain * curvature(f, z);
}

}  // namespace clone_fast

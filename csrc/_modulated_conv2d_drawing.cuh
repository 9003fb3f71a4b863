// The drawing, a 1x1 convolution to at most 4 channels (ToRGB), of what a 3x3 convolution leaves in registers.
//
// Of every 32 channels a lane of quarter q packs channels 8q .. 8q+7 of two pixels 8 apart, to store them. These words
// are its part of two left operands of mma.sync too, 16 pixels x 16 channels each, if the rows of the right ones have
// the same order: then a lane's part of these is 8 channels as they lie in memory. Of the 8 columns every output has
// two, so that quarter q finds output q of both pixels, and the lanes of a warp that store write side by side.
#pragma once

#include "_modulated_conv2d_load.cuh"

namespace clone_fast::conv3x3 {

constexpr int kMostDrawn = 4;  // channels

// In shared memory; zeros for what is missing to 4 and to kOut channels.
template <typename T, int kOut>
struct DrawingWeights {
    T weight[kMostDrawn][kOut];
    float bias[kMostDrawn];
};

template <typename T>
__device__ __forceinline__ T drawing_weight(const Conv3x3& op, int sample, int channel_out, int channel) {
    const Drawing& drawing = op.drawing;
    if (channel_out >= drawing.channels || channel >= op.out_channels) return from_float<T>(0.0f);
    return static_cast<const T*>(drawing.weight)[sample * drawing.wn + channel_out * drawing.wf + channel * drawing.wc];
}

template <typename T>
__device__ __forceinline__ float drawing_bias(const Drawing& drawing, int channel) {
    const bool inside = drawing.bias != nullptr && channel < drawing.channels;
    return inside ? load_number<T>(drawing.bias, channel, drawing.bias_float) : 0.0f;
}

// By all threads of a block.
template <typename T, int kOut>
__device__ __forceinline__ void load_drawing(const Conv3x3& op, int sample, DrawingWeights<T, kOut>& to) {
    static_assert(kMostDrawn * kOut <= kThreads);
    const int output = threadIdx.x / kOut, channel = threadIdx.x % kOut;
    if (output < kMostDrawn) to.weight[output][channel] = drawing_weight<T>(op, sample, output, channel);
    if (threadIdx.x < kMostDrawn) to.bias[threadIdx.x] = drawing_bias<T>(op.drawing, threadIdx.x);
}

// What a warp has packed of 16 pixels, times the weights.
template <typename T, int kGroups>
__device__ __forceinline__ void draw(float (&sums)[4], const Bytes16 (&units)[2][kGroups],
                                     const Bytes16 (&weights)[kGroups]) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
        const Bytes16 near = units[0][group], far = units[1][group], weight = weights[group];
        multiply_add<T>(sums, {near.x, far.x, near.y, far.y}, weight.x, weight.y);
        multiply_add<T>(sums, {near.z, far.z, near.w, far.w}, weight.z, weight.w);
    }
}

// Output lane % 4 of pixel lane / 4 to `to`, and of the pixel 8 further, where they are inside.
template <typename T>
__device__ __forceinline__ void store_drawn(const Drawing& drawing, T* to, const float (&sums)[4], float bias,
                                            bool near_inside, bool far_inside) {
    const std::uint32_t low = pack_pair<T>(-drawing.clamp, -drawing.clamp);
    const std::uint32_t high = pack_pair<T>(drawing.clamp, drawing.clamp);
    const std::uint32_t pair = limited_pair<T>(pack_pair<T>(sums[0] + bias, sums[2] + bias), low, high);
    auto* bits = reinterpret_cast<unsigned short*>(to);
    if (near_inside) bits[0] = static_cast<unsigned short>(pair);
    if (far_inside) bits[8 * drawing.channels] = static_cast<unsigned short>(pair >> 16);
}

}  // namespace clone_fast::conv3x3

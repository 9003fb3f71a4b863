// The drawing of finished pixels [N, 1, W, C], 16 to a warp, as csrc/_modulated_conv2d_tile.cuh has them.
#include "_modulated_conv2d_drawing.cuh"

using namespace clone_fast;
using namespace clone_fast::conv3x3;

template <int kOut>
void drawing_kernel(Conv3x3 op) {
    __shared__ DrawingWeights<Bfloat, kOut> drawing;
    const int lane = threadIdx.x % 32, sample = blockIdx.x, x = threadIdx.x / 32 * 16 + lane / 4;
    load_drawing(op, sample, drawing);
    __syncthreads();
    const std::int64_t pixel = static_cast<std::int64_t>(sample) * op.width + x;
    Bytes16 units[2][kOut / 32] = {}, weights[kOut / 32];
    for (int group = 0; group < kOut / 32; ++group) {
        const int channel = group * 32 + lane % 4 * 8;
        weights[group] = load16(&drawing.weight[lane / 8][channel]);
        for (int half = 0; half < 2; ++half) {
            if (channel >= op.out_channels || x + half * 8 >= op.width) continue;
            units[half][group] = load16(static_cast<Bfloat*>(op.y) + (pixel + half * 8) * op.out_channels + channel);
        }
    }
    float sums[4] = {};
    draw<Bfloat>(sums, units, weights);
    const bool drawn = lane % 4 < op.drawing.channels;
    store_drawn(op.drawing, static_cast<Bfloat*>(op.drawing.rgb) + pixel * op.drawing.channels + lane % 4, sums,
                drawing.bias[lane % 4], drawn && x < op.width, drawn && x + 8 < op.width);
}

extern "C" void draw_pixels(int n, int width, int channels, void* y, int outputs, void* weight,
                            const std::int64_t* strides, void* bias, bool bias_float, float clamp, void* rgb) {
    Conv3x3 op = {};
    op.n = n, op.width = width, op.out_channels = channels, op.y = y;
    op.drawing = {outputs, weight, bias, rgb, strides[0], strides[1], strides[2], bias_float, clamp};
    const auto kernel = channels > 32 ? drawing_kernel<64> : drawing_kernel<32>;
    launch_early("modulated_conv2d", kernel, dim3(n), kThreads, 0, nullptr, op);
}

// The 3x3 convolution of few channels on mma.sync (compute capability 8.0 and above).
#include "_modulated_conv2d_tile.cuh"

namespace clone_fast {
namespace conv3x3 {

template <typename T, int kIn, int kOut>
struct SyncEngine {
    using L = Layout<kIn, kOut>;

    static __device__ __forceinline__ void publish() {}

    // For 16 channels and one column shift, the weights of three taps wait in registers while six input rows pass by.
    static __device__ __forceinline__ void multiply(Accumulators<kOut>& sums,
                                                    const std::uint32_t (&rows)[kWarpRows + 2],
                                                    const std::uint32_t (&taps)[3], std::uint32_t weights, int lane) {
        std::uint32_t tap = weights + (lane / 8 % 2 * L::kWeightPitch + lane / 16 * 8 + lane % 8) * kUnit;
#pragma unroll 1
        for (int k = 0; k < kIn / 16; ++k) {
#pragma unroll
            for (int dx = 0; dx < 3; ++dx) {
                std::uint32_t b[3][kOut / 16][4];
#pragma unroll
                for (int dy = 0; dy < 3; ++dy) {
#pragma unroll
                    for (int j = 0; j < kOut / 16; ++j) {
                        const int unit = (dy * 3 + dx) * L::kChunks * L::kWeightPitch + j * 16;
                        load_matrices(b[dy][j], tap + unit * kUnit);
                    }
                }
#pragma unroll
                for (int i = 0; i < kWarpRows + 2; ++i) {
                    std::uint32_t a[4];
                    load_matrices(a, rows[i] + (taps[dx] ^ k * 2 * kUnit));
#pragma unroll
                    for (int dy = 0; dy < 3; ++dy) {
                        const int row = i - dy;
                        if (row < 0 || row >= kWarpRows) continue;
#pragma unroll
                        for (int j = 0; j < kOut / 8; ++j) {
                            multiply_add<T>(sums[row][j], a, b[dy][j / 2][j % 2 * 2], b[dy][j / 2][j % 2 * 2 + 1]);
                        }
                    }
                }
            }
            tap += 2 * L::kWeightPitch * kUnit;
        }
    }
};

}  // namespace conv3x3

void modulated_conv2d_3x3(const Conv3x3& op, cudaStream_t stream) {
    if (op.drawing.channels > conv3x3::kMostDrawn) fail("modulated_conv2d", "draws more than 4 channels");
    if (op.portable || compute_capability("modulated_conv2d") != 90) {
        conv3x3::dispatch<conv3x3::SyncEngine, true>(op, stream);
    } else if (op.in_channels > 32 && op.out_channels > 32) {
        modulated_conv2d_3x3_held(op, stream);
    } else {
        modulated_conv2d_3x3_sm90a(op, stream);
    }
}

bool modulated_conv2d_3x3_fits(int device, int in_channels, int out_channels) {
    using namespace conv3x3;
    const int wanted = in_channels > 32 ? (out_channels > 32 ? Layout<64, 64>::kBytes : Layout<64, 32>::kBytes)
                                        : (out_channels > 32 ? Layout<32, 64>::kBytes : Layout<32, 32>::kBytes);
    return device_fits(device, wanted);
}

}  // namespace clone_fast

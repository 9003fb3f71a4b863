// Copies of whole tiles by the tensor memory accelerator (compute capability 9.0), and the barriers that announce them.
#pragma once

#include <cuda.h>

#include "launch.cuh"

namespace clone_fast::conv3x3 {

// A barrier in shared memory. `phase` is the parity of the completions that are waited for.
struct Gate {
    std::uint32_t address;

    __device__ __forceinline__ void open(int arrivals) const {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address), "r"(arrivals) : "memory");
    }
    __device__ __forceinline__ void arrive(int count) const {
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(count) : "memory");
    }
    __device__ __forceinline__ void expect(int bytes) const {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes) : "memory");
    }
    __device__ __forceinline__ void wait(int phase) const {
        std::uint32_t done = 0;
        while (!done) {
            asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                         : "=r"(done)
                         : "r"(address), "r"(phase)
                         : "memory");
        }
    }
};

// A box of an image to shared memory, from (x, y) on, which may lie outside the image; `gate` counts its bytes.
__device__ __forceinline__ void load_box(std::uint32_t to, const CUtensorMap& map, Gate gate, int x, int y,
                                         int sample) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
                 "[%1, {%2, %3, %4, %5}], [%6];" ::"r"(to), "l"(&map), "r"(0), "r"(x), "r"(y), "r"(sample),
                 "r"(gate.address)
                 : "memory");
}

// What a copy is told of images [N, H, W, C]: boxes of `box_channels` (64 or 32) x `columns` x `rows`, zeros outside
// the image. The channels of a pixel lie together, their units of 16 bytes permuted by the address.
template <typename T>
CUtensorMap image_map(const void* x, int n, int height, int width, int channels, int box_channels, int rows,
                      int columns) {
    using Encode = decltype(&cuTensorMapEncodeTiled);
    static const Encode encode = [] {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult status;
#if CUDART_VERSION >= 12050
        check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status),
              "modulated_conv2d");
#else
        check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &status),
              "modulated_conv2d");
#endif
        if (found == nullptr) fail("modulated_conv2d", "the driver has no tensor maps");
        return reinterpret_cast<Encode>(found);
    }();
    const auto wide = [](int value) { return static_cast<cuuint64_t>(value); };
    const auto word = [](int value) { return static_cast<cuuint32_t>(value); };
    const cuuint64_t pixel = 2 * wide(channels), line = pixel * wide(width), image = line * wide(height);
    const cuuint64_t sizes[4] = {wide(channels), wide(width), wide(height), wide(n)};
    const cuuint64_t strides[3] = {pixel, line, image};
    const cuuint32_t box[4] = {word(box_channels), word(columns), word(rows), 1}, ones[4] = {1, 1, 1, 1};
    const auto type = std::is_same_v<T, Half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    CUtensorMap map;
    const CUresult result =
        encode(&map, type, 4, const_cast<void*>(x), sizes, strides, box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
               box_channels == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) fail("modulated_conv2d", "no tensor map, error " + std::to_string(result));
    return map;
}

}  // namespace clone_fast::conv3x3

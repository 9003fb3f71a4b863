// Copies of whole tiles by the tensor memory accelerator (compute capability 9.0), and the barriers that announce them.
#pragma once

#include <cuda.h>

#include "launch.cuh"

namespace clone_fast {

inline constexpr char kTmaOp[] = "modulated_conv2d";

// A barrier in shared memory. `phase` is the parity of the completions that are waited for.
struct Gate {
    std::uint32_t address;

    __device__ __forceinline__ void open(int arrivals) const {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address), "r"(arrivals) : "memory");
    }
    __device__ __forceinline__ void arrive(int count = 1) const {
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

// A box of an image to shared memory, from channel c of pixel (x, y) on, which may lie outside the image; `gate` counts
// its bytes.
__device__ __forceinline__ void load_box(std::uint32_t to, const CUtensorMap& map, Gate gate, int c, int x, int y,
                                         int sample) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
                 "[%1, {%2, %3, %4, %5}], [%6];" ::"r"(to), "l"(&map), "r"(c), "r"(x), "r"(y), "r"(sample),
                 "r"(gate.address)
                 : "memory");
}

// What a copy is told of a tensor, all in elements, the innermost dimension first (its stride is 1): boxes of so many,
// zeros outside the tensor. 64 or 32 elements of the innermost dimension lie together in shared memory, their units of
// 16 bytes permuted by the address.
template <typename T, int kRank>
CUtensorMap tensor_map(const void* data, const int (&sizes)[kRank], const std::int64_t (&strides)[kRank - 1],
                       const int (&box)[kRank]) {
    using Encode = decltype(&cuTensorMapEncodeTiled);
    static const Encode encode = [] {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult status;
#if CUDART_VERSION >= 12050
        check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status),
              kTmaOp);
#else
        check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &status),
              kTmaOp);
#endif
        if (found == nullptr) fail(kTmaOp, "the driver has no tensor maps");
        return reinterpret_cast<Encode>(found);
    }();
    cuuint64_t counts[kRank], bytes[kRank - 1];
    cuuint32_t boxes[kRank], ones[kRank];
    for (int i = 0; i < kRank; ++i) {
        counts[i] = static_cast<cuuint64_t>(sizes[i]);
        boxes[i] = static_cast<cuuint32_t>(box[i]);
        ones[i] = 1;
        if (i > 0) bytes[i - 1] = static_cast<cuuint64_t>(strides[i - 1]) * sizeof(T);
    }
    const auto type = std::is_same_v<T, Half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    CUtensorMap map;
    const CUresult result =
        encode(&map, type, kRank, const_cast<void*>(data), counts, bytes, boxes, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
               box[0] == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) fail(kTmaOp, "no tensor map, error " + std::to_string(result));
    return map;
}

// Images [N, H, W, C], dense.
template <typename T>
CUtensorMap image_map(const void* x, int n, int height, int width, int channels, int box_channels, int rows,
                      int columns) {
    const int sizes[4] = {channels, width, height, n}, box[4] = {box_channels, columns, rows, 1};
    const std::int64_t line = static_cast<std::int64_t>(width) * channels, strides[3] = {channels, line, line * height};
    return tensor_map<T, 4>(x, sizes, strides, box);
}

}  // namespace clone_fast

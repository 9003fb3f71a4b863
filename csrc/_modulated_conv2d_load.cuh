// What the kernels of modulated_conv2d share: image rows in shared memory, and how the tensor cores read them.
//
// Shared memory is counted in units of 16 bytes = 8 channels of a pixel, and ordered as the image is: [row][column]
// [channel]. The units of a pixel are permuted by its column, so that 8 neighbouring pixels, from any column on, have
// the same 8 channels on different banks: the tensor cores read a tap's matrices as fast as its neighbour's, and the
// units that neighbouring lanes copy still fill whole lines of 128 bytes (scattered units copy 8 times slower). Rows
// form a ring: the rows that a step adds overwrite those that no step needs again.
#pragma once

#include "_ptx.cuh"
#include "modulated_conv2d.h"

namespace clone_fast::conv3x3 {

constexpr int kThreads = 256;
constexpr int kUnit = 16;
constexpr int kRows = 8;  // of a step
// What a block may have on the architecture that is compiled for; kernels that need more are left empty there.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890)
constexpr int kMostSharedMemory = 99 << 10;
#else
constexpr int kMostSharedMemory = 227 << 10;
#endif
constexpr int kHaloRing = 2 * kRows + 2;  // the rows that a step needs, with its halo, and those that the next adds

template <int kChunks_, int kCols_, int kRows_>
struct Ring {
    static constexpr int kChunks = kChunks_, kCols = kCols_, kRows = kRows_;
    static constexpr int kRowBytes = kCols * kChunks * kUnit, kBytes = kRows * kRowBytes;
    static_assert(kChunks == 4 || kChunks == 8);
    static_assert(kRowBytes % 128 == 0);

    static __device__ __forceinline__ int row(int row) { return row < kRows ? row : row - kRows; }

    // Where in its row the 8 channels `chunk` of a column lie. Chunk c ^ 2k lies at offset(column, c) ^ 2k * kUnit.
    static __device__ __forceinline__ int offset(int column, int chunk) {
        return (column * kChunks + (chunk ^ (kChunks == 8 ? column % 8 : column / 2 % 4))) * kUnit;
    }
};

// One sample, channels_last and dense.
template <typename T>
struct Image {
    const T* data;
    int height, width, channels;

    __device__ __forceinline__ Image(const void* batch, int sample, int height, int width, int channels)
        : data(static_cast<const T*>(batch) + static_cast<std::int64_t>(sample) * height * width * channels),
          height(height), width(width), channels(channels) {}
    __device__ __forceinline__ const T* at(int y, int x, int channel) const {
        return data + (static_cast<std::int64_t>(y) * width + x) * channels + channel;
    }
};

template <typename T>
__device__ __forceinline__ float load_number(const void* from, std::int64_t index, bool is_float) {
    return is_float ? static_cast<const float*>(from)[index] : to_float(static_cast<const T*>(from)[index]);
}

// 16 bytes from device to shared memory; zeros where not `inside`, and then `from` is not read.
__device__ __forceinline__ void copy_async(std::uint32_t to, const void* from, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy_async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ void load_matrices(std::uint32_t (&to)[4], std::uint32_t from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(std::uint32_t (&to)[4], std::uint32_t from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
}

// [16, 16] times [16, 8] on mma.sync.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&sums)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                             std::uint32_t b1) {
#define CLONE_FAST_MMA(types)                                                               \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." types                             \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"     \
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
    if constexpr (std::is_same_v<T, Half>) CLONE_FAST_MMA("f16.f16");
    else CLONE_FAST_MMA("bf16.bf16");
#undef CLONE_FAST_MMA
}

// Whether a device has the instructions and so many bytes of shared memory for a block.
inline bool device_fits(int device, int bytes) {
    int there = 0, major = 0;
    check(cudaDeviceGetAttribute(&there, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "modulated_conv2d");
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "modulated_conv2d");
    return major >= 8 && bytes <= there;
}

// Rows y .. y + kCount - 1, columns x .. x + kCols - 1 of the image, zeros outside it, to the rows of the ring from
// `slot` on, columns 0 .. kCols - 1. Every thread copies one chunk of one column of every kGroups-th row.
template <typename Ring, int kCount, int kCols, typename T>
__device__ __forceinline__ void load_rows(const Image<T>& image, int x, int y, int slot, std::uint32_t ring) {
    constexpr int kPass = kThreads / Ring::kChunks, kGroups = kPass > kCols ? kPass / kCols : 1;  // pixels, rows
    static_assert(kPass % kCols == 0 || kCols % kPass == 0);
    static_assert(kCount % kGroups == 0);
    const int channel = threadIdx.x % Ring::kChunks * 8, group = threadIdx.x / Ring::kChunks / kCols;
#pragma unroll
    for (int pass = 0; pass < ceil_div(kCols, kPass); ++pass) {
        const int column = threadIdx.x / Ring::kChunks % kCols + pass * kPass;
        const bool inside =
            channel < image.channels && static_cast<unsigned>(x + column) < static_cast<unsigned>(image.width);
        const T* from = image.at(y + group, x + column, channel);
        const std::uint32_t to = ring + Ring::offset(column, threadIdx.x % Ring::kChunks);
#pragma unroll
        for (int i = 0; i < kCount; i += kGroups) {
            const bool read = inside && static_cast<unsigned>(y + group + i) < static_cast<unsigned>(image.height);
            copy_async(to + Ring::row(slot + group + i) * Ring::kRowBytes, read ? from : image.data, read);
            from += static_cast<std::int64_t>(kGroups) * image.width * image.channels;
        }
    }
}

// The same with one column more on either side: columns x - 1 .. x + kCols - 2 of a ring of kCols columns.
template <typename Ring, int kCount, typename T>
__device__ __forceinline__ void load_halo_rows(const Image<T>& image, int x, int y, int slot, std::uint32_t ring) {
    load_rows<Ring, kCount, Ring::kCols - 2>(image, x - 1, y, slot, ring);
    if (threadIdx.x >= kCount * 2 * Ring::kChunks) return;  // the last two columns
    const int chunk = threadIdx.x % Ring::kChunks, i = threadIdx.x / (2 * Ring::kChunks);
    const int column = Ring::kCols - 2 + threadIdx.x / Ring::kChunks % 2;
    const bool read = chunk * 8 < image.channels && x - 1 + column < image.width &&
                      static_cast<unsigned>(y + i) < static_cast<unsigned>(image.height);
    const int to = Ring::row(slot + i) * Ring::kRowBytes + Ring::offset(column, chunk);
    copy_async(ring + to, read ? image.at(y + i, x - 1 + column, chunk * 8) : image.data, read);
}

}  // namespace clone_fast::conv3x3

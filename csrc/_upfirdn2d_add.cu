// The 4x4 filter of upfirdn2d that doubles an image, with another image added in the same pass: the sum of a generator's
// RGB images, and that of the two gradients where a discriminator's branches meet.
#include "_ptx.cuh"
#include "_upfirdn2d_launch.cuh"

namespace clone_fast {
namespace {

template <typename T, typename Other>
struct Adding {
    const Other* other;
    const T* y;    // the result, to tell where in it a thread begins
    int channels;  // of a pixel of `other` where that is in channels_last and the result is not
};

// Base: Vectors in channels_last, whose Other is T, or Elements; with kPixels, where `other` alone is in channels_last,
// Vectors of planes or Elements. What is added to a pair of rows is on its way while the image is.
template <class Base, typename T, typename Other, bool kPixels>
struct Added : Base {
    using Finish = Adding<T, Other>;
    using Base::kOut, Base::kValues, Base::y, Base::c, Base::out, Base::out_row, Base::skipped, Base::stored;
    static constexpr bool kFinishes = true;
    using Held = std::conditional_t<kValues == 1, Other, Bytes16>;
    static_assert(kValues == 1 || (std::is_same_v<T, Other> && !kPixels));

    const Other* other;
    int channels;
    Held held[2][kOut];

    using Base::Base;

    __device__ __forceinline__ void begin_finish(const Finish& finish, const fir::Grid& g, const fir::Place& at) {
        std::int64_t offset = y - finish.y;
        channels = 1;
        if constexpr (kPixels) {
            channels = finish.channels;
            const int plane = static_cast<int>(at.image), sample = plane / channels, channel = plane % channels;
            offset = (offset - static_cast<std::int64_t>(plane - sample) * g.oh * g.ow) * channels + channel;
        }
        other = finish.other + offset;
    }
    // Of the rows `number` and the next one of the band.
    __device__ __forceinline__ void load_pair(int number) {
#pragma unroll
        for (int lower = 0; lower < 2; ++lower) {
            const bool wanted = static_cast<unsigned>(number + lower - skipped) < static_cast<unsigned>(stored);
#pragma unroll
            for (int i = 0; i < kOut; ++i) {
                held[lower][i] = Held{};
                if (wanted && out[i]) held[lower][i] = __ldg(reinterpret_cast<const Held*>(other + i * c * channels));
            }
            other += out_row * channels;
        }
    }
    __device__ __forceinline__ void add(int lower, float (&values)[kOut][kValues]) const {
#pragma unroll
        for (int i = 0; i < kOut; ++i) {
            float numbers[kValues];
            if constexpr (kValues == 1) numbers[0] = to_float(held[lower][i]);
            else unpack<T>(held[lower][i], numbers);
#pragma unroll
            for (int q = 0; q < kValues; ++q) values[i][q] += numbers[q];
        }
    }
};

template <typename T, typename Other>
void run_add(const T* x, const float* f, const Other* other, bool pixels, T* y, const Upfirdn2d& a,
             cudaStream_t stream) {
    const Adding<T, Other> adding{other, y, a.c};
    if constexpr (std::is_same_v<T, float>) {
        if (pixels && !a.channels_last) {
            if (a.w % kLanes<T> == 0 && a.pad_x % 2 == 0 && a.ow % kLanes<T> == 0 && is_aligned(x) && is_aligned(y)) {
                using Vectors = Added<fir::Vectors<T, 2, 1, false, true>, T, Other, true>;
                return fir::launch_fir4<T, 2, 1, Vectors>(x, f, y, a, 1, 1, stream, adding);
            }
            using Elements = Added<fir::Elements<T, 2, 1>, T, Other, true>;
            return fir::launch_fir4<T, 2, 1, Elements>(x, f, y, a, 1, 1, stream, adding);
        }
    }
    if (pixels != a.channels_last) fail(fir::kOp, "what is added must lie as x does, unless that is planes of float32");
    if constexpr (std::is_same_v<T, Other>) {
        if (a.channels_last && a.c % kLanes<T> == 0 && is_aligned(x) && is_aligned(other) && is_aligned(y)) {
            using Vectors = Added<fir::Vectors<T, 2, 1, true, false>, T, Other, false>;
            const int vectors = fir::vectors_of<T>(a.c);
            return fir::launch_fir4<T, 2, 1, Vectors>(x, f, y, a, a.c / kLanes<T> / vectors, vectors, stream, adding);
        }
    }
    using Elements = Added<fir::Elements<T, 2, 1>, T, Other, false>;
    fir::launch_fir4<T, 2, 1, Elements>(x, f, y, a, 1, a.channels_last ? a.c : 1, stream, adding);
}

}  // namespace

void upfirdn2d_add(Dtype x_dtype, const void* x, const float* f, Dtype other_dtype, const void* other,
                   bool other_channels_last, void* y, const Upfirdn2d& a, cudaStream_t stream) {
    fir::check_sizes(a);
    if (a.fh != 4 || a.fw != 4 || a.up_x != 2 || a.up_y != 2 || a.down_x != 1 || a.down_y != 1)
        fail(fir::kOp, "adding wants a 4x4 filter, up 2 and down 1");
    if (x_dtype != other_dtype && x_dtype != Dtype::float32)
        fail(fir::kOp, "what is added must have x's dtype, unless that is float32");
    with_dtype(x_dtype, fir::kOp, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const auto add = [&](auto other_tag) {
            using Other = typename decltype(other_tag)::type;
            run_add(static_cast<const T*>(x), f, static_cast<const Other*>(other), other_channels_last,
                    static_cast<T*>(y), a, stream);
        };
        if constexpr (std::is_same_v<T, float>) with_dtype(other_dtype, fir::kOp, add);
        else add(tag);
    });
}

}  // namespace clone_fast

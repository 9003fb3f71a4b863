// bias_act without the sum for the bias: elementwise, every tensor read or written once, 16 bytes at a time.
//
// Memory is one flat array of vectors of 16 bytes, whatever the shape; what depends on the shape is where a vector finds
// its bias. What is left over at the end, or everything where a tensor does not start at a multiple of 16 bytes, goes
// element by element.
#include "_bias_act.cuh"

namespace clone_fast {
namespace {

constexpr int kThreads = 256;

enum class BiasMode : int { none, one, row, each };

// Where element i of [outer, channels, inner] finds its bias.
struct BiasIndex {
    BiasMode mode;      // of a vector: no bias; one channel; kLanes channels in a row; look at each element
    Divider inner;      // in elements, and for `one` in vectors
    Divider inner_vectors;
    Divider channels;   // in elements, and for `row` in vectors
    Divider channel_vectors;

    BiasIndex(const BiasAct& op, int lanes, const void* b)
        : inner(op.inner), inner_vectors(op.inner % lanes ? 1 : op.inner / lanes), channels(op.channels),
          channel_vectors(op.channels % lanes ? 1 : op.channels / lanes) {
        if (b == nullptr) mode = BiasMode::none;
        else if (op.inner % lanes == 0) mode = BiasMode::one;
        else if (op.inner == 1 && op.channels % lanes == 0 && is_aligned(b)) mode = BiasMode::row;
        else mode = BiasMode::each;
    }

    __device__ __forceinline__ std::uint32_t channel(std::uint32_t i) const {
        std::uint32_t c;
        channels.divide(inner.divide(i), c);
        return c;
    }
};

// The bias of a vector, as it comes from memory: asked for early, together with the vector itself.
template <typename T>
struct Bias {
    float same = 0.0f;
    Bytes16 row;

    __device__ __forceinline__ void load(const T* b, const BiasIndex& index, std::uint32_t vector) {
        std::uint32_t c;
        if (index.mode == BiasMode::row) {
            index.channel_vectors.divide(vector, c);
            row = load16(b + c * kLanes<T>);
        } else if (index.mode == BiasMode::one) {
            index.channels.divide(index.inner_vectors.divide(vector), c);
            same = to_float(b[c]);
        }
    }

    __device__ __forceinline__ void get(const T* b, const BiasIndex& index, std::uint32_t vector,
                                        float (&bias)[kLanes<T>]) const {
        if (index.mode == BiasMode::row) {
            unpack<T>(row, bias);
        } else if (index.mode == BiasMode::each) {
            std::uint32_t i, c;
            index.channels.divide(index.inner.divide(vector * kLanes<T>, i), c);
#pragma unroll
            for (int l = 0; l < kLanes<T>; ++l) {
                bias[l] = to_float(b[c]);
                if (++i == index.inner.divisor) {
                    i = 0;
                    c = c + 1 == index.channels.divisor ? 0 : c + 1;
                }
            }
        } else {
#pragma unroll
            for (int l = 0; l < kLanes<T>; ++l) bias[l] = same;
        }
    }
};

// kOrder 0: value of x; 1: gradient of x, dy; 2: second of x, dy, v.
template <typename T>
struct Inputs {
    const T* at[3];
};

template <int kOrder, bool kRectified>
__device__ __forceinline__ float apply(const Formula& f, float z, float dy, float v) {
    if constexpr (kOrder == 0) return value<kRectified>(f, z);
    else if constexpr (kOrder == 1) return gradient<kRectified>(f, dy, z);
    else return second(f, v, dy, z);
}

template <typename T, int kOrder, bool kRectified>
__global__ void __launch_bounds__(kThreads) elementwise(Formula f, BiasIndex index, Inputs<T> in, const T* b, T* out,
                                                        std::uint32_t vectors, std::uint32_t elements) {
    constexpr int kInputs = kOrder + 1, kUnroll = kOrder == 0 ? 4 : 2, kWidth = kLanes<T>;
    const std::uint32_t first = blockIdx.x * (kThreads * kUnroll) + threadIdx.x;
    let_next_come();
    wait_for_previous();
    Bytes16 loaded[kUnroll][kInputs];
    Bias<T> biases[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
        const std::uint32_t vector = first + u * kThreads;
        if (vector < vectors) {
#pragma unroll
            for (int k = 0; k < kInputs; ++k) loaded[u][k] = load16(in.at[k] + std::size_t{vector} * kWidth);
        }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) biases[u].load(b, index, first + u * kThreads);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
        const std::uint32_t vector = first + u * kThreads;
        if (vector < vectors) {
            float bias[kWidth], numbers[3][kWidth], result[kWidth];
            biases[u].get(b, index, vector, bias);
#pragma unroll
            for (int k = 0; k < kInputs; ++k) unpack<T>(loaded[u][k], numbers[k]);
#pragma unroll
            for (int l = 0; l < kWidth; ++l) {
                result[l] = apply<kOrder, kRectified>(f, numbers[0][l] + bias[l], kOrder > 0 ? numbers[1][l] : 0.0f,
                                                      kOrder > 1 ? numbers[2][l] : 0.0f);
            }
            store16(out + std::size_t{vector} * kWidth, pack<T>(result));
        }
    }
    for (std::size_t i = std::size_t{vectors} * kWidth + blockIdx.x * kThreads + threadIdx.x; i < elements;
         i += std::size_t{gridDim.x} * kThreads) {
        float numbers[3] = {};
#pragma unroll
        for (int k = 0; k < kInputs; ++k) numbers[k] = to_float(in.at[k][i]);
        const float bias = index.mode == BiasMode::none ? 0.0f : to_float(b[index.channel(i)]);
        out[i] = from_float<T>(apply<kOrder, kRectified>(f, numbers[0] + bias, numbers[1], numbers[2]));
    }
}

template <typename T, int kOrder, bool kRectified>
void launch(const BiasAct& op, const void* x, const void* dy, const void* v, const void* b, void* out,
            cudaStream_t stream) {
    const std::int64_t elements = op.outer * op.channels * op.inner;
    const void* const tensors[] = {x, dy, v, out};
    bool aligned = true;
    for (const void* tensor : tensors) aligned = aligned && is_aligned(tensor);
    const std::int64_t vectors = aligned ? elements / kLanes<T> : 0;
    const std::int64_t threads = aligned ? ceil_div(elements, kLanes<T>) : elements;
    const int blocks = static_cast<int>(ceil_div(threads, kThreads * (kOrder == 0 ? 4 : 2)));
    const Inputs<T> in{{static_cast<const T*>(x), static_cast<const T*>(dy), static_cast<const T*>(v)}};
    launch_early(kBiasAct, elementwise<T, kOrder, kRectified>, blocks, kThreads, 0, stream, Formula(op),
                 BiasIndex(op, kLanes<T>, b), in, static_cast<const T*>(b), static_cast<T*>(out),
                 static_cast<std::uint32_t>(vectors), static_cast<std::uint32_t>(elements));
}

}  // namespace

void bias_act(const BiasAct& op, const void* x, const void* b, void* y, cudaStream_t stream) {
    with_dtype(op.dtype, kBiasAct, [&](auto tag) {
        with_flag(Formula::is_rectified(op.act), [&](auto rectified) {
            launch<typename decltype(tag)::type, 0, rectified.value>(op, x, nullptr, nullptr, b, y, stream);
        });
    });
}

void bias_act_gradient(const BiasAct& op, const void* dy, const void* x, const void* b, void* dx, cudaStream_t stream) {
    with_dtype(op.dtype, kBiasAct, [&](auto tag) {
        with_flag(Formula::is_rectified(op.act), [&](auto rectified) {
            launch<typename decltype(tag)::type, 1, rectified.value>(op, x, dy, nullptr, b, dx, stream);
        });
    });
}

void bias_act_second(const BiasAct& op, const void* v, const void* dy, const void* x, const void* b, void* result,
                     cudaStream_t stream) {
    with_dtype(op.dtype, kBiasAct, [&](auto tag) {
        launch<typename decltype(tag)::type, 2, false>(op, x, dy, v, b, result, stream);
    });
}

}  // namespace clone_fast

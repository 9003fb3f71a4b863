// The 3x3 convolution of 33 to 64 channels on wgmma (compute capability 9.0), the weights held in registers.
//
// The transposed product: output channels are the rows, 128 neighbouring pixels of an image row the columns. So the
// left operand is the weights, which a group of four warps holds in registers for as long as the sample lasts (9 taps
// of 64 input channels: 144 registers), and all that the tensor cores read from shared memory is the input, half of
// what they would read with the pixels on the left. Two groups take turns, a row each: while the tensor cores work for
// one, the other finishes and stores its row, so that they never wait. One more warp brings everything by TMA.
//
// A block walks down a strip of the image, 128 pixels wide. Image rows lie in a ring, one to a slot; the three slots
// around a row serve its nine taps, whose columns are as many pixels further in the slot. The weights come through the
// same ring, two taps to a slot, at the start and whenever the sample changes. What is to be drawn of a row is drawn of
// the finished row in shared memory, while that is on its way to device memory.
#include "_modulated_conv2d_tile.cuh"
#include "_tma.cuh"

namespace clone_fast {
namespace conv3x3 {

namespace held {

constexpr int kStrip = 128, kPixel = 128;  // pixels of a row; bytes of a pixel: 64 channels
constexpr int kRowBytes = (kStrip + 2) * kPixel, kSlotBytes = (kRowBytes + 1023) / 1024 * 1024;
constexpr int kSlots = 11, kTapBytes = 64 * kPixel, kWeightSlots = 5;
constexpr int kOutBytes = kStrip * kPixel;  // the finished row of a group
constexpr int kOut = kSlots * kSlotBytes, kNoise = kOut + 2 * kOutBytes, kGates = kNoise + 2 * kStrip * 4;
constexpr int kDrawing = kGates + 2 * kSlots * 8, kDrawingBytes = kMostDrawn * kPixel;  // of a group
constexpr int kBytes = kDrawing + 2 * kDrawingBytes;
constexpr int kGroup = 128, kAllThreads = 3 * kGroup;
static_assert(2 * kTapBytes <= kSlotBytes && kBytes <= 227 << 10);

enum Barrier { kTurnBarrier = 1, kGroupBarrier = 3 };  // one of each for each group

// What frees a slot: four warps arrive for each of the three rows of the result that an image row is read for. Where
// there are fewer, at the ends of a walk and for weights, some arrive more than once.
constexpr int kReaders = 12;

using Weights = std::uint32_t[9][4][4];  // tap, 16 input channels, what a lane holds of a left operand

#define CLONE_FAST_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define CLONE_FAST_16(i) CLONE_FAST_4(i), CLONE_FAST_4(i + 4), CLONE_FAST_4(i + 8), CLONE_FAST_4(i + 12)
#define CLONE_FAST_WGMMA_128(types)                                                                             \
    asm volatile("{.reg .pred p; .reg .b64 b; setp.ne.b32 p, %70, 0; mov.b64 b, {%68, %69}; "                   \
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." types                                           \
                 " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
                 "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, "   \
                 "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "   \
                 "%56, %57, %58, %59, %60, %61, %62, %63}, {%64, %65, %66, %67}, b, p, 1, 1, 0;}"               \
                 : CLONE_FAST_16(0), CLONE_FAST_16(16), CLONE_FAST_16(32), CLONE_FAST_16(48)                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(low), "r"(high), "r"(add))

// d += a b, or d = a b where `add` is 0: 64 rows, 16 of each warp, x 128 pixels, 16 terms.
template <typename T>
__device__ __forceinline__ void held_multiply_add(float (&d)[64], const std::uint32_t (&a)[4], std::uint32_t low,
                                                  std::uint32_t high, int add) {
    if constexpr (std::is_same_v<T, Half>) CLONE_FAST_WGMMA_128("f16.f16");
    else CLONE_FAST_WGMMA_128("bf16.bf16");
}

#undef CLONE_FAST_4
#undef CLONE_FAST_16
#undef CLONE_FAST_WGMMA_128

// One number of the noise as it lies in memory, 0 where not `inside`: it is not waited for until it is used.
__device__ __forceinline__ std::uint32_t load_word(const void* from, std::int64_t index, bool is_float, bool inside) {
    std::uint32_t word;
    const int bytes = is_float ? 4 : 2;
    asm volatile("{\n"
                 ".reg .pred word, half;\n"
                 "setp.eq.s32 word, %2, 4;\n"
                 "setp.eq.s32 half, %2, 2;\n"
                 "mov.b32 %0, 0;\n"
                 "@word ld.global.b32 %0, [%1];\n"
                 "@half ld.global.u16 %0, [%1];\n"
                 "}\n"
                 : "=&r"(word)
                 : "l"(static_cast<const char*>(from) + index * bytes), "r"(inside ? bytes : 0));
    return word;
}

// The rows of a strip that a block makes, one after the other, and the slots that they take of the ring.
struct Walk {
    int row, strip, sample, slot = 0, weights_of = -1;
    bool starts = true;  // a new strip, or the first: nothing of it is in the ring

    __device__ __forceinline__ Walk(int tile, int height, int strips)
        : row(tile % height), strip(tile / height % strips), sample(tile / height / strips) {}
    __device__ __forceinline__ void advance(int height, int strips) {
        starts = ++row == height;
        if (!starts) return;
        row = 0;
        if (++strip < strips) return;
        strip = 0;
        ++sample;
    }
    __device__ __forceinline__ bool new_weights(bool of_sample) {
        if (weights_of >= 0 && (!of_sample || weights_of == sample)) return false;
        weights_of = sample;
        return true;
    }
};

struct Maps {
    CUtensorMap x, y, weight;
    bool in_innermost, flip_y, flip_x;  // of the weight: whether input channels lie side by side; taps in reverse
};

__device__ __forceinline__ void load_tap(std::uint32_t to, const Maps& maps, Gate gate, int tap, int sample) {
    const int y = tap / 3, x = tap % 3;
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
                 "[%1, {%2, %2, %3, %4, %5}], [%6];" ::"r"(to), "l"(&maps.weight), "r"(0),
                 "r"(maps.flip_x ? 2 - x : x), "r"(maps.flip_y ? 2 - y : y), "r"(sample), "r"(gate.address)
                 : "memory");
}

// The ring. Slots are counted from the first that was filled; a slot's `phase` is the parity of the ring's rounds.
struct Slots {
    std::uint32_t base;
    __device__ __forceinline__ std::uint32_t data(int slot) const { return base + slot % kSlots * kSlotBytes; }
    __device__ __forceinline__ Gate full(int slot) const { return Gate{base + kGates + slot % kSlots * 8}; }
    __device__ __forceinline__ Gate empty(int slot) const { return Gate{base + kGates + (kSlots + slot % kSlots) * 8}; }
    __device__ __forceinline__ int phase(int slot) const { return slot / kSlots % 2; }
};

// The one thread that brings weights and rows, in the order in which they are used.
__device__ __forceinline__ void bring(const Conv3x3& op, const Maps& maps, Slots ring, Walk at, int count, int strips) {
    int slot = 0;
    const auto take = [&](int bytes) {
        if (slot >= kSlots) ring.empty(slot).wait(ring.phase(slot - kSlots));
        ring.full(slot).expect(bytes);
        return ring.data(slot);
    };
    for (int i = 0; i < count; ++i) {
        if (at.new_weights(op.wn != 0)) {
            for (int tap = 0; tap < 9; tap += 2, ++slot) {
                const std::uint32_t to = take(tap < 8 ? 2 * kTapBytes : kTapBytes);
                const int sample = op.wn != 0 ? at.sample : 0;
                load_tap(to, maps, ring.full(slot), tap, sample);
                if (tap < 8) load_tap(to + kTapBytes, maps, ring.full(slot), tap + 1, sample);
            }
        }
        for (int row = at.starts ? at.row - 1 : at.row + 1; row < at.row + 2; ++row, ++slot) {
            const std::uint32_t to = take(kRowBytes);
            load_box(to, maps.x, ring.full(slot), 0, at.strip * kStrip - 1, row, at.sample);
        }
        at.advance(op.height, strips);
    }
}

// The weights of a slot's taps, from the ring to registers. Lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void hold(Weights& weights, const Slots& ring, int slot, bool in_innermost, int warp,
                                     int lane) {
    const int half = lane / 8 % 2, k_half = lane / 16;
    // Units of 16 bytes are permuted by the row of 128 bytes, and every matrix begins at a multiple of 8 rows.
    const int row = in_innermost ? warp * 16 + half * 8 + lane % 8 : k_half * 8 + lane % 8;
    const int unit = in_innermost ? k_half : warp * 2 + half;
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) {
        if (tap % 2 == 0) ring.full(slot + tap / 2).wait(ring.phase(slot + tap / 2));
        const std::uint32_t from = ring.data(slot + tap / 2) + tap % 2 * kTapBytes + row * kPixel;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            if (in_innermost) load_matrices(weights[tap][k], from + ((unit + 2 * k) ^ lane % 8) * kUnit);
            else load_matrices_transposed(weights[tap][k], from + k * 16 * kPixel + (unit ^ lane % 8) * kUnit);
        }
    }
}

// The weights of a drawing by the threads of a group, zeros for what is missing: [output][pair of 8][chunk of 8].
template <typename T>
__device__ __forceinline__ void load_drawing(const Conv3x3& op, int sample, T* to) {
    const int output = threadIdx.x % kGroup / 32;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int channel = threadIdx.x % 32 * 2 + i;
        to[output * 64 + channel % 8 / 2 * 16 + channel / 8 * 2 + i] =
            drawing_weight<T>(op, sample, output, channel);
    }
}

// Draws the 32 pixels of a warp, which all four have put together in `row`; x is the first of them.
template <typename T>
__device__ __forceinline__ void draw_row(const Conv3x3& op, std::uint32_t row, const T* weights, float bias, int sample,
                                         int y, int x, int lane) {
    const T* own = weights + lane / 8 * 64 + lane % 4 * 16;
    const Bytes16 low = load16(own), high = load16(own + 8);
    const std::uint32_t right[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    const std::int64_t first = (static_cast<std::int64_t>(sample) * op.height + y) * op.width + x + lane / 4;
    T* to = static_cast<T*>(op.drawing.rgb) + first * op.drawing.channels + lane % 4;
    const bool drawn = lane % 4 < op.drawing.channels;
#pragma unroll
    for (int begin = 0; begin < 32; begin += 16) {
        float sums[4] = {};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            std::uint32_t left[4];
            load_matrices(left, row + (begin + lane % 16) * kPixel + ((2 * k + lane / 16) ^ lane % 8) * kUnit);
#pragma unroll
            for (int i = 0; i < 4; ++i) {  // where there is no channel, but infinite noise, nothing is to be drawn
                if ((2 * k + i / 2) * 8 >= op.out_channels) left[i] = 0;
            }
            multiply_add<T>(sums, left, right[2 * k], right[2 * k + 1]);
        }
        const int px = x + begin + lane / 4;
        store_drawn(op.drawing, to + begin * op.drawing.channels, sums, bias, drawn && px < op.width,
                    drawn && px + 8 < op.width);
    }
}

template <typename T, bool kDraws>
__global__ void __launch_bounds__(kAllThreads, 1)
    conv3x3_held_kernel(const __grid_constant__ Conv3x3 op, const __grid_constant__ Maps maps) {
    extern __shared__ __align__(1024) unsigned char held_memory[];
    const Slots ring{shared_address(held_memory)};
    const int lane = threadIdx.x % 32, warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    const int strips = ceil_div(op.width, kStrip);
    const std::int64_t tiles = static_cast<std::int64_t>(op.n) * strips * op.height;
    const int begin = static_cast<int>(blockIdx.x * tiles / gridDim.x);
    const int count = static_cast<int>((blockIdx.x + 1) * tiles / gridDim.x) - begin;
    Walk at(begin, op.height, strips);

    if (threadIdx.x == 0) {
        for (int slot = 0; slot < kSlots; ++slot) {
            ring.full(slot).open(1);
            ring.empty(slot).open(kReaders);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (warp >= 8) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == 2 * kGroup) bring(op, maps, ring, at, count, strips);
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");  // 144 for weights, 64 for sums

    const int group = warp / 4, thread = threadIdx.x % kGroup;
    const std::uint32_t out = ring.base + kOut + group * kOutBytes;
    float* noise = reinterpret_cast<float*>(held_memory + kNoise) + group * kStrip;
    const float slope = op.negative / op.positive;
    const std::uint32_t limit = pack_pair<T>(op.clamp, op.clamp), negative_limit = pack_pair<T>(-op.clamp, -op.clamp);
    float bias[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int channel = warp % 4 * 16 + lane / 4 + 8 * i;
        const bool inside = op.bias != nullptr && channel < op.out_channels;
        bias[i] = inside ? load_number<T>(op.bias, channel, op.bias_float) * op.positive : 0.0f;
    }
    const bool scaled = op.noise != nullptr && op.strength != nullptr;
    const float strength = op.positive * (scaled ? load_number<T>(op.strength, 0, op.strength_float) : 1.0f);
    T* drawing = reinterpret_cast<T*>(held_memory + kDrawing + group * kDrawingBytes);
    [[maybe_unused]] const float drawing_shift = kDraws ? drawing_bias<T>(op.drawing, lane % 4) : 0.0f;
    [[maybe_unused]] int drawing_of = -1;  // the sample whose weights are there
    if (group == 1) barrier_arrive(kTurnBarrier, 2 * kGroup);  // the first turn is the first group's

    Weights weights;
    int slot = 0;
    for (int i = 0; i < count; ++i) {
        if (at.new_weights(op.wn != 0)) {
            hold(weights, ring, slot, maps.in_innermost, warp % 4, lane);
            __syncwarp();  // all lanes have read
            if (lane == 0) {
                for (int j = 0; j < kWeightSlots; ++j) ring.empty(slot + j).arrive(group == 0 ? 2 : 1);
            }
            slot += kWeightSlots;
        }
        const int row = at.row, x = at.strip * kStrip, sample = at.sample, first = at.starts ? slot : slot - 2;
        const bool starts = at.starts;
        slot = first + 3;
        at.advance(op.height, strips);
        const bool ends = at.starts || i + 1 == count;
        if (i % 2 != group) continue;

        const std::int64_t place = sample * op.noise_stride + static_cast<std::int64_t>(row) * op.width + x + thread;
        const std::uint32_t word =
            load_word(op.noise, place, op.noise_float, op.noise != nullptr && x + thread < op.width);
#pragma unroll
        for (int dy = 0; dy < 3; ++dy) ring.full(first + dy).wait(ring.phase(first + dy));
        barrier_wait(kTurnBarrier + group, 2 * kGroup);  // the other group's row is all in the tensor cores' queue
        float sums[64];
        group_fence();
#pragma unroll
        for (int dy = 0; dy < 3; ++dy) {
            const std::uint32_t from = ring.data(first + dy) / kUnit | 1 << 16;
#pragma unroll
            for (int part = 0; part < 12; ++part) {
                const int dx = part / 4, k = part % 4;
                // 128 bytes to the next pixel, 1024 to the next 8; units are permuted by the pixel's address
                held_multiply_add<T>(sums, weights[dy * 3 + dx][k], from + (dx * kPixel + k * 32) / kUnit, 64 | 1 << 30,
                                     dy + part > 0);
            }
        }
        group_commit();
        if (i + 1 < count) barrier_arrive(kTurnBarrier + 1 - group, 2 * kGroup);

        float number = __uint_as_float(word);
        if (!op.noise_float) {
            const unsigned short bits = static_cast<unsigned short>(word);
            if constexpr (std::is_same_v<T, Half>) number = to_float(__ushort_as_half(bits));
            else number = to_float(__ushort_as_bfloat16(bits));
        }
        noise[thread] = number * strength;
        if (thread == 0) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");  // `out` is free again
        barrier_wait(kGroupBarrier + group, kGroup);
        group_wait<0>();
        if (lane == 0) {
            ring.empty(first).arrive(starts ? 3 : 1);
            ring.empty(first + 1).arrive(1 + starts + ends);
            ring.empty(first + 2).arrive(ends ? 3 : 1);
        }

        if constexpr (kDraws) {  // the group has drawn the row before this one
            if (drawing_of < 0 || (op.drawing.wn != 0 && drawing_of != sample)) load_drawing(op, sample, drawing);
            drawing_of = sample;
        }

        // Lane l gives the address of row l % 8, a pixel, of matrix l / 8: 8 channels of 8 pixels.
        const std::uint32_t to = out + (lane / 16 * 8 + lane % 8) * kPixel +
                                 ((warp % 4 * 2 + lane / 8 % 2) ^ lane % 8) * kUnit;
#pragma unroll
        for (int j = 0; j < kStrip / 8; j += 2) {
            std::uint32_t words[4];
#pragma unroll
            for (int m = 0; m < 4; ++m) {  // channels from 0 or 8 on, pixels from 0 or 8 on
                const float2 pair = *reinterpret_cast<const float2*>(noise + 8 * (j + m / 2) + lane % 4 * 2);
                const float* sum = sums + 4 * (j + m / 2) + m % 2 * 2;
                const float low = fmaf(sum[0], op.positive, pair.x + bias[m % 2]);
                const float high = fmaf(sum[1], op.positive, pair.y + bias[m % 2]);
                words[m] = limited_pair<T>(pack_pair<T>(fmaxf(low, low * slope), fmaxf(high, high * slope)),
                                           negative_limit, limit);
            }
            asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                             to + 8 * j * kPixel),
                         "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                         : "memory");
        }
        publish();
        barrier_wait(kGroupBarrier + group, kGroup);
        if (thread == 0) {
            asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(
                             &maps.y),
                         "r"(0), "r"(x), "r"(row), "r"(sample), "r"(out)
                         : "memory");
            asm volatile("cp.async.bulk.commit_group;" ::: "memory");
        }
        if constexpr (kDraws) {
            const int begin = warp % 4 * 32;
            draw_row<T>(op, out + begin * kPixel, drawing, drawing_shift, sample, row, x + begin, lane);
        }
    }
    if (thread == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

template <typename T, bool kDraws>
void launch_held(const Conv3x3& op, cudaStream_t stream) {
    const auto kernel = conv3x3_held_kernel<T, kDraws>;
    allow_shared_memory(kernel, kBytes, "modulated_conv2d");
    const std::int64_t tiles = static_cast<std::int64_t>(op.n) * op.height * ceil_div(op.width, kStrip);
    const std::int64_t blocks = op.blocks > 0 ? op.blocks : multiprocessors("modulated_conv2d");
    Maps maps;
    maps.x = image_map<T>(op.x, op.n, op.height, op.width, op.in_channels, 64, 1, kStrip + 2);
    maps.y = image_map<T>(op.y, op.n, op.height, op.width, op.out_channels, 64, 1, kStrip);
    maps.in_innermost = op.weight_rows;
    maps.flip_y = op.wy < 0;
    maps.flip_x = op.wx < 0;
    const T* first = static_cast<const T*>(op.weight) + (maps.flip_y ? 2 * op.wy : 0) + (maps.flip_x ? 2 * op.wx : 0);
    const int sizes[5] = {maps.in_innermost ? op.in_channels : op.out_channels,
                          maps.in_innermost ? op.out_channels : op.in_channels, 3, 3, op.wn != 0 ? op.n : 1};
    const std::int64_t wx = maps.flip_x ? -op.wx : op.wx, wy = maps.flip_y ? -op.wy : op.wy;
    const std::int64_t strides[4] = {maps.in_innermost ? op.wo : op.wi, wx, wy, op.wn != 0 ? op.wn : 3 * wy};
    const int box[5] = {64, 64, 1, 1, 1};
    maps.weight = tensor_map<T, 5>(first, sizes, strides, box);
    kernel<<<static_cast<unsigned>(tiles < blocks ? tiles : blocks), kAllThreads, kBytes, stream>>>(op, maps);
    check_launch("modulated_conv2d");
}

}  // namespace held
}  // namespace conv3x3

void modulated_conv2d_3x3_held(const Conv3x3& op, cudaStream_t stream) {
    with_flag(op.dtype == Dtype::float16, [&](auto is_half) {
        using T = std::conditional_t<decltype(is_half)::value, Half, Bfloat>;
        with_flag(op.drawing.channels > 0, [&](auto draws) {
            conv3x3::held::launch_held<T, decltype(draws)::value>(op, stream);
        });
    });
}

}  // namespace clone_fast

// The Laplacian pyramid loss between two images, forward and backward.
//
// The pyramid is linear, so it is that of x - y. Going down, a kernel for each level reads the level once, writes the
// next level and the slopes rho'(band), and sums rho(band); what is small enough is done by one block for each plane.
// Going up, with g_j = weights[j] / numel_j * slope_j,
//     d loss / d level_j = g_j + reduce^T(d loss / d level_{j+1} - expand^T(g_j)),
// which takes the place of level j in memory. The loss is a sum of partial sums in a fixed order.
#include "laplacian_pyramid.h"

#include <algorithm>
#include <initializer_list>

#include "laplacian_pyramid_levels.cuh"
#include "laplacian_pyramid_tail.cuh"

namespace clone_fast {
namespace {

using namespace pyramid;

constexpr char kOp[] = "laplacian_pyramid";
constexpr int kThreads = 256, kTailThreads = 1024;

using LargeTile = Tile<64, 64, 4>;        // of a level that fills the device
using SmallTile = Tile<32, 32, 2>;        // of one that does not
using RgbTile = Tile<32, 64, 2, 3>;       // of three channels that are neighbours in memory

// ---- launching ---------------------------------------------------------------------------------------------------

// kernel<<<blocks, threads, shared, stream>>>(args...), which may start before the kernel in front of it has ended:
// every kernel here waits for that one by itself.
template <typename... Parameters, typename... Args>
void launch(void (*kernel)(Parameters...), std::int64_t blocks, int threads, int shared, cudaStream_t stream,
            const Args&... args) {
    if (blocks >= std::int64_t{1} << 31) fail(kOp, "too many tiles for one launch");
    cudaLaunchAttribute early;
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = compute_capability(kOp) >= 90 ? 1 : 0;
    check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(args)...), kOp);
}

// ---- the plan: sizes, workspace ------------------------------------------------------------------------------------

// Below a level of one pixel every level is the same pixel and every band but the last is zero: they are not computed.
struct Plan {
    struct Step {
        int height, width;
        float scale;                // weight / number of elements
        std::int64_t level, slope;  // offsets into the workspace in bytes, of inner levels
        std::int64_t partial;       // index of the first partial sum
        bool large;                 // tiles are LargeTile
    };

    std::int64_t planes;
    std::vector<Step> steps;
    int tail;              // the first level that the tail does; steps.size(): none
    bool rgb = false;      // the finest level goes by RgbTile
    std::int64_t partials = 0, partial_offset = 0, bytes = 0;
    float constant = 0;    // the loss of the levels that are not computed

    Plan(const LaplacianPyramid& op, bool keep);

    int count() const { return static_cast<int>(steps.size()); }
    std::int64_t numel(int j) const { return planes * steps[j].height * steps[j].width; }
    std::int64_t residual_blocks() const {
        return std::min<std::int64_t>(ceil_div<std::int64_t>(numel(count() - 1), 4 * kThreads), 4096);
    }
    template <class Tile>
    Level level(int j) const {
        const Step& s = steps[j];
        return {s.height, s.width, ceil_div(s.height, Tile::height), ceil_div(s.width, Tile::width)};
    }
    template <class Tile>
    std::int64_t blocks(int j) const {
        const Level size = level<Tile>(j);
        return planes / Tile::planes * size.tiles_y * size.tiles_x;
    }
};

Plan::Plan(const LaplacianPyramid& op, bool keep) : planes(std::int64_t{op.samples} * op.channels) {
    const int wanted = static_cast<int>(op.weights.size());
    const int filled = 2 * multiprocessors(kOp);
    for (int j = 0, height = op.height, width = op.width; j < wanted; ++j) {
        float weight = op.weights[j];
        const bool pixel = j > 0 && height == 1 && width == 1;
        if (pixel && j + 1 < wanted) {
            for (int k = j; k + 1 < wanted; ++k) constant += op.weights[k] * std::max(op.eps, 0.0f);
            weight = op.weights.back();
        }
        steps.push_back({height, width, 0, 0, 0, 0, false});
        steps.back().scale = static_cast<float>(weight / static_cast<double>(numel(j)));
        steps.back().large = blocks<LargeTile>(j) >= filled;
        if (pixel) break;
        height = (height + 1) / 2, width = (width + 1) / 2;
    }
    tail = 1;
    while (tail < count() && std::max(steps[tail].height, steps[tail].width) > kTailSize) ++tail;
    const auto take = [&](std::int64_t size) {
        const std::int64_t at = bytes;
        bytes += ceil_div<std::int64_t>(size, 256) * 256;
        return at;
    };
    for (int j = 0; j <= std::min(tail, count() - 1); ++j) {
        Step& s = steps[j];
        s.partial = partials;
        if (j == tail) partials += planes;
        else if (j > 0 && j == count() - 1) partials += residual_blocks();
        else partials += std::max(blocks<RgbTile>(j), s.large || j == 0 ? blocks<LargeTile>(j) : blocks<SmallTile>(j));
        if (j > 1 || (j == 1 && !keep)) s.level = take(4 * numel(j));
        if (keep && j > 0 && j < tail) s.slope = take(numel(j) * (op.absolute() ? 1 : 4));
    }
    partial_offset = take(4 * partials);
}

// ---- images of any strides -------------------------------------------------------------------------------------------

bool all_multiples_of_4(std::initializer_list<std::int64_t> numbers) {
    return std::all_of(numbers.begin(), numbers.end(), [](std::int64_t n) { return n % 4 == 0; });
}

// Four neighbours of a row lie one after the other, at an aligned address.
bool has_vectors(const LaplacianPyramid& op, const void* x, const ImageStrides& s) {
    return s.w == 1 && all_multiples_of_4({op.width, s.h, s.c, s.n}) &&
           is_aligned(x, op.dtype == Dtype::float32 ? 16 : 8);
}

// The same of rows of three channels for each pixel.
bool is_rgb(const LaplacianPyramid& op, const void* x, const ImageStrides& s) {
    return op.channels == 3 && s.c == 1 && s.w == 3 && all_multiples_of_4({op.width, s.h, s.n}) &&
           is_aligned(x, op.dtype == Dtype::float32 ? 16 : 8);
}

template <typename T>
T* at(void* workspace, std::int64_t offset) {
    return reinterpret_cast<T*>(static_cast<char*>(workspace) + offset);
}

// ---- one level -------------------------------------------------------------------------------------------------------

template <typename T, bool kDifference, class Tile>
std::int64_t down(const Plan& plan, int j, Down& a, cudaStream_t stream) {
    a.level = plan.level<Tile>(j);
    launch(down_level<T, kDifference, Tile>, plan.blocks<Tile>(j), Tile::threads, 0, stream, a);
    return plan.blocks<Tile>(j);
}

template <typename T, class Tile>
void up(const Plan& plan, int j, Up& a, cudaStream_t stream) {
    a.level = plan.level<Tile>(j);
    launch(up_level<T, Tile>, plan.blocks<Tile>(j) + (a.sum.loss != nullptr), Tile::threads, 0, stream, a);
}

void tail(const Plan& plan, float* level, bool keep, const Rho& rho, float* partial, cudaStream_t stream) {
    Tail a = {level, keep, rho, plan.count() - plan.tail, {}, {}, {}, 0, {}, partial};
    for (int j = 0; j < a.count; ++j) {
        const Plan::Step& s = plan.steps[plan.tail + j];
        a.height[j] = s.height, a.width[j] = s.width, a.scale[j] = s.scale, a.offset[j] = a.scratch;
        a.scratch += s.height * s.width;
    }
    const int bytes = 4 * (a.scratch + a.height[0] * ((a.width[0] + 1) / 2));
    if (bytes > 48 * 1024) allow_shared_memory(tail_levels<kTailThreads>, bytes, kOp);
    launch(tail_levels<kTailThreads>, plan.planes, kTailThreads, bytes, stream, a);
}

}  // namespace

// ---- the launchers ---------------------------------------------------------------------------------------------------

std::int64_t laplacian_pyramid_workspace(const LaplacianPyramid& op, bool keep) { return Plan(op, keep).bytes; }

void laplacian_pyramid(const LaplacianPyramid& op, const void* x, const ImageStrides& x_strides, const void* y,
                       const ImageStrides& y_strides, float* loss, void* slope, float* coarse, void* workspace,
                       cudaStream_t stream) {
    const bool keep = slope != nullptr;
    const Plan plan(op, keep);
    const int last = plan.count() - 1;
    float* partials = at<float>(workspace, plan.partial_offset);
    const auto level_of = [&](int j) { return j == 1 && keep ? coarse : at<float>(workspace, plan.steps[j].level); };
    const auto slope_of = [&](int j) -> void* {
        return !keep ? nullptr : j == 0 ? slope : at<void>(workspace, plan.steps[j].slope);
    };
    std::int64_t used = 0;  // partial sums
    for (int j = 0; j <= last && j < plan.tail; ++j) {
        const Plan::Step& step = plan.steps[j];
        Down a = {};
        a.last = j == last, a.rho = {op.eps}, a.scale = step.scale, a.slope = slope_of(j), a.partial = partials + used;
        a.low = j < last ? level_of(j + 1) : nullptr;
        if (j == 0) {
            a.x = x, a.y = y, a.x_strides = x_strides, a.y_strides = y_strides, a.channels = op.channels;
            const bool rgb = is_rgb(op, x, x_strides) && is_rgb(op, y, y_strides);
            a.vectors = rgb || (has_vectors(op, x, x_strides) && has_vectors(op, y, y_strides));
            with_dtype(op.dtype, kOp, [&](auto tag) {
                using T = typename decltype(tag)::type;
                used += rgb ? down<T, true, RgbTile>(plan, j, a, stream) : down<T, true, LargeTile>(plan, j, a, stream);
            });
        } else if (j == last) {
            launch(residual_level<kThreads>, plan.residual_blocks(), kThreads, 0, stream, level_of(j), plan.numel(j), a.rho,
                   a.scale, a.partial);
            used += plan.residual_blocks();
        } else {
            a.x = level_of(j), a.channels = 1, a.vectors = step.width % 4 == 0;
            a.x_strides = {std::int64_t{step.height} * step.width, 0, step.width, 1};
            used += step.large ? down<float, false, LargeTile>(plan, j, a, stream)
                               : down<float, false, SmallTile>(plan, j, a, stream);
        }
    }
    if (plan.tail <= last) {
        tail(plan, level_of(plan.tail), keep, {op.eps}, partials + used, stream);
        used += plan.planes;
    }
    Sum sum = {partials, used, plan.constant, loss};
    for (int j = std::min(plan.tail, last) - 1; keep && j > 0; --j) {
        const Plan::Step& step = plan.steps[j];
        Up a = {};
        a.slope = slope_of(j), a.coarse = level_of(j + 1), a.absolute = op.absolute(), a.scale = step.scale;
        a.out = level_of(j), a.channels = 1, a.vectors = step.width % 4 == 0, a.sum = sum;
        a.strides = {std::int64_t{step.height} * step.width, 0, step.width, 1};
        if (step.large) up<float, LargeTile>(plan, j, a, stream);
        else up<float, SmallTile>(plan, j, a, stream);
        sum.loss = nullptr;
    }
    if (sum.loss != nullptr) launch(sum_loss<1024>, 1, 1024, 0, stream, sum);
}

void laplacian_pyramid_backward(const LaplacianPyramid& op, const float* dloss, const void* slope, const float* coarse,
                                void* dx, const ImageStrides& dx_strides, cudaStream_t stream) {
    const Plan plan(op, true);
    Up a = {};
    a.slope = slope, a.coarse = coarse, a.gain = dloss, a.last = plan.count() == 1, a.absolute = op.absolute();
    a.scale = plan.steps[0].scale, a.out = dx, a.strides = dx_strides, a.channels = op.channels;
    const bool rgb = is_rgb(op, dx, dx_strides);
    a.vectors = rgb || has_vectors(op, dx, dx_strides);
    with_dtype(op.dtype, kOp, [&](auto tag) {
        using T = typename decltype(tag)::type;
        if (rgb) up<T, RgbTile>(plan, 0, a, stream);
        else up<T, LargeTile>(plan, 0, a, stream);
    });
}

}  // namespace clone_fast

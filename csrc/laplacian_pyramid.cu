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
constexpr int kThreads = 256;

using LargeTile = Tile<4, 8>;   // of a level that fills the device
using SmallTile = Tile<4, 4>;   // of one that does not: less to do for each thread
using RgbTile = Tile<3, 8, 3>;  // of three channels that are neighbours in memory

// ---- launching ---------------------------------------------------------------------------------------------------

// kernel<<<blocks, threads, shared, stream>>>(args...). Programmatic dependent launch was tried: kernels that wait on
// the multiprocessors that are free first spread badly over the others, and the chain took longer.
template <typename... Parameters, typename... Args>
void launch(void (*kernel)(Parameters...), std::int64_t blocks, int threads, int shared, cudaStream_t stream,
            const Args&... args) {
    if (blocks >= std::int64_t{1} << 31) fail(kOp, "too many tiles for one launch");
    kernel<<<static_cast<unsigned>(blocks), threads, shared, stream>>>(args...);
    check_launch(kOp);
}

// ---- the plan: sizes, workspace ------------------------------------------------------------------------------------

// Below a level of one pixel every level is the same pixel and every band but the last is zero: they are not computed.
struct Plan {
    struct Step {
        int height, width;
        double scale;               // weight / number of elements
        std::int64_t level, slope;  // offsets into the workspace in bytes, of inner levels
        std::int64_t partial;       // index of the first partial sum
        bool large;                 // tiles are LargeTile
    };

    std::int64_t planes;
    std::vector<Step> steps;
    int tail;          // the first level that the tail does; steps.size(): none
    bool rgb = false;  // the finest level goes by RgbTile
    std::int64_t partials = 0, partial_offset = 0, bytes = 0;
    double constant = 0;  // the loss of the levels that are not computed

    Plan(const LaplacianPyramid& op, bool keep);

    int count() const { return static_cast<int>(steps.size()); }
    std::int64_t numel(int j) const { return planes * steps[j].height * steps[j].width; }
    std::int64_t residual_blocks() const {
        return std::min<std::int64_t>(ceil_div<std::int64_t>(numel(count() - 1), 4 * kThreads), 4096);
    }
    template <class Tile>
    Level level(int j) const {
        const Step& s = steps[j];
        return {s.height, s.width, s.width <= kStrip ? 1 : ceil_div(s.width, kStep), ceil_div(s.height, Tile::rows)};
    }
    template <class Tile>
    std::int64_t blocks(int j) const {
        const Level size = level<Tile>(j);
        return planes / Tile::planes * size.strips * size.tiles;
    }
};

Plan::Plan(const LaplacianPyramid& op, bool keep) : planes(std::int64_t{op.samples} * op.channels) {
    const int wanted = static_cast<int>(op.weights.size());
    const int filled = 2 * multiprocessors(kOp);
    for (int j = 0, height = op.height, width = op.width; j < wanted; ++j) {
        float weight = op.weights[j];
        const bool pixel = j > 0 && height == 1 && width == 1;
        if (pixel && j + 1 < wanted) {
            for (int k = j; k + 1 < wanted; ++k) constant += double{op.weights[k]} * std::max(op.eps, 0.0f);
            weight = op.weights.back();
        }
        steps.push_back({height, width, 0, 0, 0, 0, false});
        steps.back().scale = weight / static_cast<double>(numel(j));
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
        else partials += std::max(blocks<RgbTile>(j), blocks<SmallTile>(j));  // of the smallest tiles that may do it
        if (j > 1 || (j == 1 && !keep)) s.level = take(4 * numel(j));
        if (keep && j > 0 && j < tail) s.slope = take(numel(j) * (op.absolute() ? 1 : 4));
    }
    partial_offset = take(8 * partials);
}

// ---- images of any strides
// -------------------------------------------------------------------------------------------

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

// ---- one level
// -------------------------------------------------------------------------------------------------------

template <typename T, bool kDifference, bool kAligned, class Tile>
std::int64_t down(const LaplacianPyramid& op, const Plan& plan, int j, Down& a, cudaStream_t stream) {
    a.level = plan.level<Tile>(j);
    with_flag(op.absolute(), [&](auto absolute) {
        launch(down_level<T, kDifference, absolute.value, kAligned, Tile>, plan.blocks<Tile>(j), Tile::threads, 0,
               stream, a);
    });
    return plan.blocks<Tile>(j);
}

template <typename T, bool kAligned, class Tile>
void up(const LaplacianPyramid& op, const Plan& plan, int j, Up& a, cudaStream_t stream) {
    a.level = plan.level<Tile>(j);
    with_flag(op.absolute(), [&](auto absolute) {
        launch(up_level<T, absolute.value, kAligned, Tile>, plan.blocks<Tile>(j) + (a.sum.loss != nullptr),
               Tile::threads, 0, stream, a);
    });
}

void tail(const LaplacianPyramid& op, const Plan& plan, float* level, bool keep, double* partial, cudaStream_t stream) {
    Tail a = {level, keep, op.eps * op.eps, plan.count() - plan.tail, {}, {}, {}, {}, {}, partial};
    int floats = 0;
    for (int j = 0; j < a.count; ++j) {
        const Plan::Step& s = plan.steps[plan.tail + j];
        a.height[j] = s.height, a.width[j] = s.width, a.scale[j] = s.scale;
        a.pitch[j] = ceil_div(s.width, 4) * 4, a.offset[j] = floats;
        floats += s.height * a.pitch[j];
    }
    with_flag(op.absolute(), [&](auto absolute) {
        launch(tail_levels<absolute.value>, plan.planes, kTailThreads, 4 * floats, stream, a);
    });
}

}  // namespace

// ---- the launchers
// ---------------------------------------------------------------------------------------------------

std::int64_t laplacian_pyramid_workspace(const LaplacianPyramid& op, bool keep) { return Plan(op, keep).bytes; }

void laplacian_pyramid(const LaplacianPyramid& op, const void* x, const ImageStrides& x_strides, const void* y,
                       const ImageStrides& y_strides, float* loss, void* slope, float* coarse, void* workspace,
                       cudaStream_t stream) {
    const bool keep = slope != nullptr;
    const Plan plan(op, keep);
    const int last = plan.count() - 1;
    double* partials = at<double>(workspace, plan.partial_offset);
    const auto level_of = [&](int j) { return j == 1 && keep ? coarse : at<float>(workspace, plan.steps[j].level); };
    const auto slope_of = [&](int j) -> void* {
        return !keep ? nullptr : j == 0 ? slope : at<void>(workspace, plan.steps[j].slope);
    };
    std::int64_t used = 0;  // partial sums
    for (int j = 0; j <= last && j < plan.tail; ++j) {
        const Plan::Step& step = plan.steps[j];
        Down a = {};
        a.last = j == last, a.eps_squared = op.eps * op.eps, a.scale = step.scale, a.slope = slope_of(j),
        a.partial = partials + used;
        a.low = j < last ? level_of(j + 1) : nullptr;
        if (j == 0) {
            a.x = x, a.y = y, a.x_strides = x_strides, a.y_strides = y_strides, a.channels = op.channels;
            const bool rgb = is_rgb(op, x, x_strides) && is_rgb(op, y, y_strides);
            a.vectors = rgb || (has_vectors(op, x, x_strides) && has_vectors(op, y, y_strides));
            with_dtype(op.dtype, kOp, [&](auto tag) {
                using T = typename decltype(tag)::type;
                if (rgb) used += down<T, true, true, RgbTile>(op, plan, j, a, stream);
                else if (step.width % 4 == 0) used += down<T, true, true, LargeTile>(op, plan, j, a, stream);
                else used += down<T, true, false, SmallTile>(op, plan, j, a, stream);
            });
        } else if (j == last) {
            with_flag(op.absolute(), [&](auto absolute) {
                launch(residual_level<absolute.value, kThreads>, plan.residual_blocks(), kThreads, 0, stream,
                       level_of(j), plan.numel(j), Rho<absolute.value>{a.eps_squared}, a.scale, a.partial);
            });
            used += plan.residual_blocks();
        } else {
            a.x = level_of(j), a.channels = 1, a.vectors = step.width % 4 == 0;
            a.x_strides = {std::int64_t{step.height} * step.width, 0, step.width, 1};
            if (!a.vectors) used += down<float, false, false, SmallTile>(op, plan, j, a, stream);
            else if (step.large) used += down<float, false, true, LargeTile>(op, plan, j, a, stream);
            else used += down<float, false, true, SmallTile>(op, plan, j, a, stream);
        }
    }
    if (plan.tail <= last) {
        tail(op, plan, level_of(plan.tail), keep, partials + used, stream);
        used += plan.planes;
    }
    Sum sum = {partials, used, plan.constant, loss};
    for (int j = std::min(plan.tail, last) - 1; keep && j > 0; --j) {
        const Plan::Step& step = plan.steps[j];
        Up a = {};
        a.slope = slope_of(j), a.coarse = level_of(j + 1), a.scale = static_cast<float>(step.scale);
        a.out = level_of(j), a.channels = 1, a.sum = sum;
        a.strides = {std::int64_t{step.height} * step.width, 0, step.width, 1};
        if (step.width % 4 != 0) up<float, false, SmallTile>(op, plan, j, a, stream);
        else if (step.large) up<float, true, LargeTile>(op, plan, j, a, stream);
        else up<float, true, SmallTile>(op, plan, j, a, stream);
        sum.loss = nullptr;
    }
    if (sum.loss != nullptr) launch(sum_loss, 1, 1024, 0, stream, sum);
}

void laplacian_pyramid_backward(const LaplacianPyramid& op, const float* dloss, const void* slope, const float* coarse,
                                void* dx, const ImageStrides& dx_strides, cudaStream_t stream) {
    const Plan plan(op, true);
    Up a = {};
    a.slope = slope, a.coarse = plan.count() > 1 ? coarse : nullptr, a.gain = dloss;
    a.scale = static_cast<float>(plan.steps[0].scale), a.out = dx, a.strides = dx_strides, a.channels = op.channels;
    with_dtype(op.dtype, kOp, [&](auto tag) {
        using T = typename decltype(tag)::type;
        if (is_rgb(op, dx, dx_strides)) up<T, true, RgbTile>(op, plan, 0, a, stream);
        else if (has_vectors(op, dx, dx_strides)) up<T, true, LargeTile>(op, plan, 0, a, stream);
        else up<T, false, SmallTile>(op, plan, 0, a, stream);
    });
}

}  // namespace clone_fast

// The Laplacian pyramid loss between two images, forward and backward.
//
// The pyramid is linear, so it is that of x - y. Going down, a kernel for each level reads the level once, writes the
// next level and the slopes rho'(band), and sums rho(band); what is small enough is done in one launch, by a cluster of
// blocks for each plane. Going up, with g_j = weights[j] / numel_j * slope_j,
//     d loss / d level_j = g_j + reduce^T(d loss / d level_{j+1} - expand^T(g_j)),
// which takes the place of level j in memory. The loss is a sum of partial sums in a fixed order. A mean square error
// joins at the top: its sum where x - y is made, its gradient where dx is written.
#include "laplacian_pyramid.h"

#include <algorithm>
#include <climits>
#include <initializer_list>

#include "laplacian_pyramid_march.cuh"
#include "laplacian_pyramid_tail.cuh"

namespace clone_fast {
namespace {

using namespace pyramid;

constexpr char kOp[] = "laplacian_pyramid";
constexpr int kThreads = 256;

using LargeTile = Tile<4, 8>;   // of rows that cannot be read by march_down, width % 4 == 0
using SmallTile = Tile<4, 4>;   // of all other widths
using RgbTile = Tile<3, 8, 3>;  // of three channels that are neighbours in memory

// ---- launching ---------------------------------------------------------------------------------------------------

struct Grid {
    std::int64_t blocks;
    int threads, shared = 0, cluster = 1;  // bytes; blocks
};

// Where and how the kernels of a call run.
struct Launch {
    cudaStream_t stream;
    bool early;  // see wait_for_previous, with which every kernel begins

    template <typename... Parameters, typename... Args>
    void operator()(void (*kernel)(Parameters...), const Grid& grid, const Args&... args) const {
        if (grid.blocks >= std::int64_t{1} << 31) fail(kOp, "too many tiles for one launch");
        cudaLaunchAttribute attributes[2] = {};
        cudaLaunchConfig_t config = {};
        config.gridDim = dim3(static_cast<unsigned>(grid.blocks)), config.blockDim = dim3(grid.threads);
        config.dynamicSmemBytes = grid.shared, config.stream = stream, config.attrs = attributes;
        if (early) {
            cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
            attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
            attribute.val.programmaticStreamSerializationAllowed = 1;
        }
        if (grid.cluster > 1) {
            cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
            attribute.id = cudaLaunchAttributeClusterDimension;
            attribute.val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
        }
        check(cudaLaunchKernelEx(&config, kernel, args...), kOp);
    }
};

// ---- the plan: sizes, workspace ------------------------------------------------------------------------------------

// Below a level of one pixel every level is the same pixel and every band but the last is zero: they are not computed.
struct Plan {
    struct Step {
        int height, width;
        double scale;               // weight / number of elements
        std::int64_t level, slope;  // offsets into the workspace in bytes, of inner levels
    };

    std::int64_t planes;
    std::vector<Step> steps;
    int tail;          // the first level that the tail does; steps.size(): none
    int cluster;       // blocks of the tail for each plane
    int processors;
    bool hopper;       // what it has may be used
    std::int64_t partials = 0, partial_offset = 0, bytes = 0;
    double constant = 0;  // the loss of the levels that are not computed

    Plan(const LaplacianPyramid& op, bool keep);

    int count() const { return static_cast<int>(steps.size()); }
    std::int64_t numel(int j) const { return planes * steps[j].height * steps[j].width; }
    // How blocks of march_down and march_up share a level: as few rows for each warp as let all blocks run at once.
    Level march(int j, int& rows) const {
        const Step& s = steps[j];
        const int strips = s.width <= kStrip ? 1 : ceil_div(s.width, kStep);
        const auto tiles = [&] { return ceil_div(s.height, rows * kMarchWarps); };
        rows = 8;
        while (rows < 32 && planes * strips * tiles() > kMarchResident * processors) rows += 2;
        return {s.height, s.width, strips, tiles()};
    }
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
    processors = multiprocessors(kOp);
    hopper = is_for_hopper(tail_levels<true>, kOp);
    for (int j = 0, height = op.height, width = op.width; j < wanted; ++j) {
        float weight = op.weights[j];
        const bool pixel = j > 0 && height == 1 && width == 1;
        if (pixel && j + 1 < wanted) {
            for (int k = j; k + 1 < wanted; ++k) constant += double{op.weights[k]} * std::max(op.eps, 0.0f);
            weight = op.weights.back();
        }
        steps.push_back({height, width, 0, 0, 0});
        steps.back().scale = weight / static_cast<double>(numel(j));
        if (pixel) break;
        height = (height + 1) / 2, width = (width + 1) / 2;
    }
    // A multiprocessor holds one block of the tail, which is a chain of waits: planes that come in a second wave cost
    // more than to begin a level further down. Fewer than 16 rows are not worth a block.
    const int tail_size = hopper && planes * kTailCluster <= processors ? kTailSize : kTailAlone;
    tail = 1;
    while (tail < count() && std::max(steps[tail].height, steps[tail].width) > tail_size) ++tail;
    cluster = hopper && tail < count() ? kTailCluster : 1;
    while (cluster > 1 && (8 * cluster >= steps[tail].height || planes * cluster > processors)) cluster /= 2;
    const auto take = [&](std::int64_t size) {
        const std::int64_t at = bytes;
        bytes += ceil_div<std::int64_t>(size, 256) * 256;
        return at;
    };
    for (int j = 0; j <= std::min(tail, count() - 1); ++j) {
        Step& s = steps[j];
        if (j == tail) partials += planes * cluster;
        else if (j > 0 && j == count() - 1) partials += residual_blocks();
        else partials += std::max(blocks<RgbTile>(j), blocks<SmallTile>(j));  // of the smallest tiles that may do it
        if (j > 1 || (j == 1 && !keep)) s.level = take(4 * numel(j));
        if (keep && j > 0 && j < tail) s.slope = take(numel(j) * (op.absolute() ? 1 : 4));
    }
    partial_offset = take(8 * partials);
}

// ---- images of any strides ------------------------------------------------------------------------------------------

bool all_multiples_of_4(std::initializer_list<std::int64_t> numbers) {
    return std::all_of(numbers.begin(), numbers.end(), [](std::int64_t n) { return n % 4 == 0; });
}

// Four neighbours of a row lie one after the other, at an aligned address.
bool has_vectors(const LaplacianPyramid& op, const void* x, const ImageStrides& s) {
    return s.w == 1 && s.h * op.height <= INT_MAX && all_multiples_of_4({op.width, s.h, s.c, s.n}) &&
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

// ---- one level ------------------------------------------------------------------------------------------------------

// use(absolute, squares), flags of kernels; there are no squares but at the top.
template <bool kTop, typename Use>
void with_flags(const LaplacianPyramid& op, Use&& use) {
    with_flag(op.absolute(), [&](auto absolute) {
        if constexpr (kTop) with_flag(op.squares(), [&](auto squares) { use(absolute, squares); });
        else use(absolute, std::false_type{});
    });
}

template <typename T, bool kDifference, bool kAligned, class Tile>
std::int64_t down(const LaplacianPyramid& op, const Plan& plan, int j, Down& a, const Launch& launch) {
    a.level = plan.level<Tile>(j);
    with_flags<kDifference>(op, [&](auto absolute, auto squares) {
        const auto kernel = down_level<T, kDifference, squares.value, absolute.value, kAligned, Tile>;
        launch(kernel, Grid{plan.blocks<Tile>(j), Tile::threads}, a);
    });
    return plan.blocks<Tile>(j);
}

template <typename T, bool kDifference>
std::int64_t down_march(const LaplacianPyramid& op, const Plan& plan, int j, Down& a, const Launch& launch) {
    a.level = plan.march(j, a.rows);
    const std::int64_t blocks = plan.planes * a.level.strips * a.level.tiles;
    with_flags<kDifference>(op, [&](auto absolute, auto squares) {
        launch(march_down<T, kDifference, squares.value, absolute.value>, Grid{blocks, kMarchThreads}, a);
    });
    return blocks;
}

// kTop: of dx.
template <typename T, bool kTop>
void up_march(const LaplacianPyramid& op, const Plan& plan, int j, Up& a, const Launch& launch) {
    a.level = plan.march(j, a.rows);
    const std::int64_t blocks = plan.planes * a.level.strips * a.level.tiles + (a.sum.loss != nullptr);
    with_flags<kTop>(op, [&](auto absolute, auto squares) {
        launch(march_up<T, squares.value, absolute.value>, Grid{blocks, kMarchThreads}, a);
    });
}

template <typename T, bool kTop, bool kAligned, class Tile>
void up(const LaplacianPyramid& op, const Plan& plan, int j, Up& a, const Launch& launch) {
    a.level = plan.level<Tile>(j);
    with_flags<kTop>(op, [&](auto absolute, auto squares) {
        launch(up_level<T, squares.value, absolute.value, kAligned, Tile>,
               Grid{plan.blocks<Tile>(j) + (a.sum.loss != nullptr), Tile::threads}, a);
    });
}

void tail(const LaplacianPyramid& op, const Plan& plan, float* level, bool keep, double* partial,
          const Launch& launch) {
    Tail a = {};
    a.level = level, a.keep = keep, a.eps_squared = op.eps * op.eps, a.partial = partial;
    a.blocks = plan.cluster, a.count = plan.count() - plan.tail;
    int shift = 1;
    while (plan.cluster << shift < plan.steps[plan.tail].height) ++shift;
    for (int j = 0; j < a.count; ++j, shift = std::max(shift - 1, 1)) {
        const Plan::Step& s = plan.steps[plan.tail + j];
        a.height[j] = s.height, a.width[j] = s.width, a.scale[j] = s.scale, a.shift[j] = shift;
        a.pitch[j] = ceil_div(s.width, 4) * 4, a.offset[j] = a.slopes;
        a.slopes += a.pitch[j] << shift;
    }
    with_flag(op.absolute(), [&](auto absolute) {
        const auto kernel = tail_levels<absolute.value>;
        const int shared = 2 * static_cast<int>(sizeof(float)) * a.slopes;
        allow_shared_memory(kernel, shared, kOp);
        launch(kernel, Grid{plan.planes * plan.cluster, kTailThreads, shared, plan.cluster}, a);
    });
}

}  // namespace

// ---- the launchers --------------------------------------------------------------------------------------------------

std::int64_t laplacian_pyramid_workspace(const LaplacianPyramid& op, bool keep) { return Plan(op, keep).bytes; }

void laplacian_pyramid(const LaplacianPyramid& op, const void* x, const ImageStrides& x_strides, const void* y,
                       const ImageStrides& y_strides, float* loss, void* slope, float* coarse, void* workspace,
                       cudaStream_t stream) {
    const bool keep = slope != nullptr;
    const Plan plan(op, keep);
    const Launch launch{stream, plan.hopper};
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
            a.squares = op.mse / static_cast<double>(plan.numel(0));
            const bool rgb = is_rgb(op, x, x_strides) && is_rgb(op, y, y_strides);
            const bool rows = has_vectors(op, x, x_strides) && has_vectors(op, y, y_strides);
            a.vectors = rgb || rows;
            with_dtype(op.dtype, kOp, [&](auto tag) {
                using T = typename decltype(tag)::type;
                if (rgb) used += down<T, true, true, RgbTile>(op, plan, j, a, launch);
                else if (rows && !a.last) used += down_march<T, true>(op, plan, j, a, launch);
                else if (step.width % 4 == 0) used += down<T, true, true, LargeTile>(op, plan, j, a, launch);
                else used += down<T, true, false, SmallTile>(op, plan, j, a, launch);
            });
        } else if (j == last) {
            with_flag(op.absolute(), [&](auto absolute) {
                launch(residual_level<absolute.value, kThreads>, Grid{plan.residual_blocks(), kThreads}, level_of(j),
                       plan.numel(j), Rho<absolute.value>{a.eps_squared}, a.scale, a.partial);
            });
            used += plan.residual_blocks();
        } else {
            a.x = level_of(j), a.channels = 1, a.vectors = step.width % 4 == 0;
            a.x_strides = {std::int64_t{step.height} * step.width, 0, step.width, 1};
            if (a.vectors) used += down_march<float, false>(op, plan, j, a, launch);
            else used += down<float, false, false, SmallTile>(op, plan, j, a, launch);
        }
    }
    if (plan.tail <= last) {
        tail(op, plan, level_of(plan.tail), keep, partials + used, launch);
        used += plan.planes * plan.cluster;
    }
    Sum sum = {partials, used, plan.constant, loss};
    for (int j = std::min(plan.tail, last) - 1; keep && j > 0; --j) {
        const Plan::Step& step = plan.steps[j];
        Up a = {};
        a.slope = slope_of(j), a.coarse = level_of(j + 1), a.scale = static_cast<float>(step.scale);
        a.out = level_of(j), a.channels = 1, a.sum = sum;
        a.strides = {std::int64_t{step.height} * step.width, 0, step.width, 1};
        if (step.width % 4 == 0) up_march<float, false>(op, plan, j, a, launch);
        else up<float, false, false, SmallTile>(op, plan, j, a, launch);
        sum.loss = nullptr;
    }
    if (sum.loss != nullptr) launch(sum_loss, Grid{1, 1024}, sum);
}

void laplacian_pyramid_backward(const LaplacianPyramid& op, const float* dloss, const void* slope, const float* coarse,
                                const void* x, const ImageStrides& x_strides, const void* y,
                                const ImageStrides& y_strides, void* dx, const ImageStrides& dx_strides,
                                cudaStream_t stream) {
    const Plan plan(op, true);
    const Launch launch{stream, plan.hopper};
    Up a = {};
    a.slope = slope, a.coarse = plan.count() > 1 ? coarse : nullptr, a.gain = dloss;
    a.scale = static_cast<float>(plan.steps[0].scale), a.out = dx, a.strides = dx_strides, a.channels = op.channels;
    a.squares = static_cast<float>(2 * op.mse / static_cast<double>(plan.numel(0)));
    a.x = x, a.y = y, a.x_strides = x_strides, a.y_strides = y_strides;
    const auto all = [&](auto& is) {
        return is(op, dx, dx_strides) && (!op.squares() || (is(op, x, x_strides) && is(op, y, y_strides)));
    };
    const bool rgb = all(is_rgb), rows = all(has_vectors);
    with_dtype(op.dtype, kOp, [&](auto tag) {
        using T = typename decltype(tag)::type;
        if (rgb) up<T, true, true, RgbTile>(op, plan, 0, a, launch);
        else if (rows && a.coarse != nullptr) up_march<T, true>(op, plan, 0, a, launch);
        else if (rows) up<T, true, true, LargeTile>(op, plan, 0, a, launch);
        else up<T, true, false, SmallTile>(op, plan, 0, a, launch);
    });
}

}  // namespace clone_fast

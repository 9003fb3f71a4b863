// The launcher of the strided convolution: what the copies are told, and who takes which tiles.
#include "_strided_conv_maps.cuh"
#include "_strided_conv_sm90a.cuh"

namespace clone_fast {
namespace strided {

template <typename T, typename Scheme, int kOut, int kBlocks, int kChunk>
void launch(const StridedConv& op, cudaStream_t stream) {
    using L = Tile<Scheme, kOut, kBlocks, kChunk>;
    Work work{};
    work.chunks = ceil_div(op.in_channels, kChunk);
    work.depth = L::depth(work.chunks);
    if (work.depth < 2 || work.chunks > kMaxChunks) fail(kOp, "weights that no block can hold");
    constexpr int kScale = Scheme::kScale;
    const int cover = kScale == 2 ? op.padding : 0;
    work.tiles_x = ceil_div(ceil_div(op.out_width + cover, kScale), kSide);
    work.tiles_y = ceil_div(ceil_div(op.out_height + cover, kScale), L::kRows);
    work.tiles = op.n / op.results * work.tiles_x * work.tiles_y;
    work.blocks_of_channels = ceil_div(op.out_channels, kOut);
    const int shares = work.blocks_of_channels * op.results;
    const int most = ceil_div(work.tiles, kGroups), fair = multiprocessors(kOp) / shares;
    work.programs = fair < 1 ? 1 : (fair < most ? fair : most);
    const Images images{op.x, op.n, op.height, op.width, op.in_channels};
    Maps maps{};
    maps.weight = weight_map<T>(op.weight, 9 * op.results, op.out_channels, op.in_channels, kChunk, kOut);
    constexpr int kStep = kScale == 2 ? 1 : 2;
    for (int i = 0; i < Scheme::kUnits; ++i) {
        // Of an image of one row or column, the odd ones are asked for outside alone: any map gives zeros there.
        const int y = i / 2 < op.height ? i / 2 : 0, z = i % 2 < op.width ? i % 2 : 0;
        maps.image[i] = every_map<T>(images, y, z, kStep, kChunk, L::kBoxRows, kBoxColumns);
    }
    const auto kernel = strided_kernel<T, Scheme, kOut, kBlocks, kChunk>;
    allow_shared_memory(kernel, L::bytes(work.chunks), kOp);
    kernel<<<work.programs * shares, kThreads, L::bytes(work.chunks), stream>>>(op, work, maps);
    check_launch(kOp);
}

// Calls back with each tile that a block can hold, best first, until the answer is yes.
template <typename Function>
bool any_tile(bool transposed, int in_channels, int out_channels, int wanted, Function&& function) {
    int index = 0;
    const auto consider = [&](auto scheme, auto out, auto blocks, auto chunk) {
        using Scheme = decltype(scheme);
        constexpr int kOut = decltype(out)::value, kBlocks = decltype(blocks)::value, kChunk = decltype(chunk)::value;
        const int chunks = ceil_div(in_channels, kChunk);
        const bool fits = chunks <= kMaxChunks && Tile<Scheme, kOut, kBlocks, kChunk>::depth(chunks) >= 2;
        constexpr bool kLeast = kOut == (std::is_same_v<Scheme, Up> ? 32 : 64);
        const bool good = wanted == index || (wanted < 0 && (kLeast || out_channels > kOut / 2) &&
                                              (kChunk == 64 || in_channels <= 32));
        ++index;
        return std::is_same_v<Scheme, Up> == transposed && fits && good && function(scheme, out, blocks, chunk);
    };
    std::integral_constant<int, 128> c128;
    std::integral_constant<int, 64> c64;
    std::integral_constant<int, 32> c32;
    std::integral_constant<int, 1> one;
    std::integral_constant<int, 2> two;
    return consider(Up{}, c64, one, c64) || consider(Up{}, c32, one, c64) || consider(Up{}, c32, two, c64) ||
           consider(Down{}, c64, two, c32) || consider(Down{}, c64, one, c32) || consider(Down{}, c128, one, c64) ||
           consider(Down{}, c64, two, c64) || consider(Down{}, c64, one, c64);
}

}  // namespace strided

bool strided_conv_fits(int device, bool transposed, int in_channels, int out_channels) {
    int major = 0, minor = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), strided::kOp);
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), strided::kOp);
    return 10 * major + minor == 90 &&
           strided::any_tile(transposed, in_channels, out_channels, -1, [](auto...) { return true; });
}

void strided_conv(const StridedConv& op, cudaStream_t stream) {
    using namespace strided;
    if (op.dtype == Dtype::float32) fail(kOp, "half precision only");
    if (op.in_channels % 8 || op.out_channels % 32) fail(kOp, "channels that no kernel exists for");
    const bool found = any_tile(op.transposed, op.in_channels, op.out_channels, op.tile,
                                [&](auto scheme, auto out, auto blocks, auto chunk) {
                                    using Scheme = decltype(scheme);
                                    constexpr int kOut = decltype(out)::value, kBlocks = decltype(blocks)::value;
                                    constexpr int kChunk = decltype(chunk)::value;
                                    const bool is_half = op.dtype == Dtype::float16;
                                    if (is_half) launch<Half, Scheme, kOut, kBlocks, kChunk>(op, stream);
                                    else launch<Bfloat, Scheme, kOut, kBlocks, kChunk>(op, stream);
                                    return true;
                                });
    if (!found) fail(kOp, "channels that no tile holds");
}

}  // namespace clone_fast

// The pybind11 module clone_fast._C: one function for each launcher, nothing else.
//
// Pointers and streams travel as integers, a missing tensor as 0, dtypes as the tags of launch.cuh. No function here
// holds a Python object: clone_fast/cuda/<op>.py keeps the tensors alive and has made every check that a user can see.
// Every launcher runs without the interpreter's lock.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <tuple>
#include <vector>

#include "dtype.h"

// ---- one include for each op, in the order of the alphabet
#include "_act_backward.h"
#include "_resampled_conv.h"
#include "_strided_conv.h"
#include "adam.h"
#include "bias_act.h"
#include "laplacian_pyramid.h"
#include "modulated_conv2d.h"
#include "styles.h"
#include "upfirdn2d.h"

namespace py = pybind11;
using namespace clone_fast;
using namespace pybind11::literals;

namespace {

using Address = std::uintptr_t;

template <typename T = void>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

template <typename T>
std::vector<T*> pointers(const std::vector<Address>& addresses) {
    std::vector<T*> found;
    for (const Address address : addresses) found.push_back(pointer<T>(address));
    return found;
}

cudaStream_t stream_of(Address address) { return reinterpret_cast<cudaStream_t>(address); }

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "The CUDA kernels of clone_fast. Called by clone_fast.cuda, which documents each of them.";
    module.attr("CUDART_VERSION") = CUDART_VERSION;
    const py::call_guard<py::gil_scoped_release> unlocked;

    // ---- adam
    using Tensor = std::tuple<Address, Address, Address, Address, Address, std::int64_t>;  // as in AdamTensor
    module.def(
        "adam",
        [](const std::vector<Tensor>& tensors, Address rate, double beta1, double beta2, double epsilon,
           Address stream) {
            std::vector<AdamTensor> table;
            for (const auto& [parameter, gradient, mean, square, steps, count] : tensors)
                table.push_back({pointer<float>(parameter), pointer<const float>(gradient), pointer<float>(mean),
                                 pointer<float>(square), pointer<const float>(steps), count});
            adam(table, pointer<const float>(rate), beta1, beta2, epsilon, stream_of(stream));
        },
        unlocked);

    // ---- bias_act
    py::class_<BiasAct>(module, "BiasAct", py::module_local()).def(py::init([](int dtype, std::int64_t outer, std::int64_t channels,
                                                           std::int64_t inner, int act, float alpha, float gain, float clamp) {
        return BiasAct{Dtype{dtype}, outer, channels, inner, Act{act}, alpha, gain, clamp};
    }));
    module.def(
        "bias_act",
        [](const BiasAct& op, Address x, Address b, Address y, Address stream) {
            bias_act(op, pointer(x), pointer(b), pointer(y), stream_of(stream));
        },
        unlocked);
    module.def(
        "bias_act_gradient",
        [](const BiasAct& op, Address dy, Address x, Address b, Address dx, Address stream) {
            bias_act_gradient(op, pointer(dy), pointer(x), pointer(b), pointer(dx), stream_of(stream));
        },
        unlocked);
    module.def(
        "bias_act_gradients",
        [](const BiasAct& op, Address dy, Address x, Address b, Address dx, Address db, Address partial, Address stream) {
            bias_act_gradients(op, pointer(dy), pointer(x), pointer(b), pointer(dx), pointer(db), pointer<float>(partial),
                               stream_of(stream));
        },
        unlocked);
    module.def("bias_act_partials", &bias_act_partials);
    module.def(
        "bias_act_second",
        [](const BiasAct& op, Address v, Address dy, Address x, Address b, Address result, Address stream) {
            bias_act_second(op, pointer(v), pointer(dy), pointer(x), pointer(b), pointer(result), stream_of(stream));
        },
        unlocked);

    // ---- laplacian_pyramid
    using Strides = std::array<std::int64_t, 4>;
    py::class_<LaplacianPyramid>(module, "LaplacianPyramid")
        .def(py::init([](int dtype, int samples, int channels, int height, int width, std::vector<float> weights, float eps,
                         double mse) {
            return LaplacianPyramid{Dtype{dtype}, samples, channels, height, width, std::move(weights), eps, mse};
        }));
    module.def("laplacian_pyramid_workspace", &laplacian_pyramid_workspace);
    module.def(
        "laplacian_pyramid",
        [](const LaplacianPyramid& op, Address x, const Strides& xs, Address y, const Strides& ys, Address loss,
           Address slope, Address coarse, Address workspace, Address stream) {
            laplacian_pyramid(op, pointer(x), {xs[0], xs[1], xs[2], xs[3]}, pointer(y), {ys[0], ys[1], ys[2], ys[3]},
                              pointer<float>(loss), pointer(slope), pointer<float>(coarse), pointer(workspace),
                              stream_of(stream));
        },
        unlocked);
    module.def(
        "laplacian_pyramid_backward",
        [](const LaplacianPyramid& op, Address dloss, Address slope, Address coarse, Address x, const Strides& xs,
           Address y, const Strides& ys, Address dx, const Strides& s, Address stream) {
            laplacian_pyramid_backward(op, pointer<float>(dloss), pointer(slope), pointer<float>(coarse), pointer(x),
                                       {xs[0], xs[1], xs[2], xs[3]}, pointer(y), {ys[0], ys[1], ys[2], ys[3]},
                                       pointer(dx), {s[0], s[1], s[2], s[3]}, stream_of(stream));
        },
        unlocked);

    // ---- modulated_conv2d
    py::class_<Conv3x3>(module, "Conv3x3")
        .def(py::init([](int dtype, int n, int height, int width, int in_channels, int out_channels, Address x,
                         Address weight, Address y, Address noise, Address strength, Address bias,
                         const std::array<std::int64_t, 5>& strides, std::int64_t noise_stride, bool weight_rows,
                         const std::array<bool, 3>& floats, float positive, float negative, float clamp, bool portable,
                         int blocks) {
                 return Conv3x3{Dtype{dtype}, n, height, width, in_channels, out_channels, pointer(x), pointer(weight),
                                pointer(y), pointer(noise), pointer(strength), pointer(bias), strides[0], strides[1],
                                strides[2], strides[3], strides[4], noise_stride, weight_rows, floats[0], floats[1],
                                floats[2], positive, negative, clamp, portable, blocks};
             }),
             py::kw_only(), "dtype"_a, "n"_a, "height"_a, "width"_a, "in_channels"_a, "out_channels"_a, "x"_a,
             "weight"_a, "y"_a, "noise"_a, "strength"_a, "bias"_a, "weight_strides"_a, "noise_stride"_a,
             "weight_rows"_a, "floats"_a, "positive"_a, "negative"_a, "clamp"_a, "portable"_a, "blocks"_a);
    module.def(
        "modulated_conv2d_3x3",
        [](const Conv3x3& op, Address stream) { modulated_conv2d_3x3(op, stream_of(stream)); }, unlocked);
    py::class_<Drawing>(module, "Drawing")
        .def(py::init([](int channels, Address weight, Address bias, Address rgb,
                         const std::array<std::int64_t, 3>& strides, bool bias_float, float clamp) {
                 return Drawing{channels,   pointer(weight), pointer(bias), pointer(rgb), strides[0],
                                strides[1], strides[2],      bias_float,    clamp};
             }),
             py::kw_only(), "channels"_a, "weight"_a, "bias"_a, "rgb"_a, "weight_strides"_a, "bias_float"_a,
             "clamp"_a);
    module.def(
        "modulated_conv2d_3x3_drawn",
        [](Conv3x3 op, const Drawing& drawing, Address stream) {
            op.drawing = drawing;
            modulated_conv2d_3x3(op, stream_of(stream));
        },
        unlocked);
    module.def("modulated_conv2d_3x3_fits", &modulated_conv2d_3x3_fits);
    py::class_<Conv3x3Wgrad>(module, "Conv3x3Wgrad")
        .def(py::init([](int dtype, int n, int height, int width, int channels_a, int channels_b, int results,
                         int partials, Address a, Address b, Address partial, Address y, bool portable) {
                 return Conv3x3Wgrad{Dtype{dtype}, n, height, width, channels_a, channels_b, results, partials,
                                     pointer(a), pointer(b), pointer<float>(partial), pointer<float>(y), portable};
             }),
             py::kw_only(), "dtype"_a, "n"_a, "height"_a, "width"_a, "channels_a"_a, "channels_b"_a, "results"_a,
             "partials"_a, "a"_a, "b"_a, "partial"_a, "y"_a, "portable"_a);
    module.def(
        "modulated_conv2d_3x3_wgrad",
        [](const Conv3x3Wgrad& op, Address stream) { modulated_conv2d_3x3_wgrad(op, stream_of(stream)); }, unlocked);
    module.def("modulated_conv2d_3x3_wgrad_fits", &modulated_conv2d_3x3_wgrad_fits);
    module.def("modulated_conv2d_3x3_wgrad_floats", &modulated_conv2d_3x3_wgrad_floats);
    module.def("modulated_conv2d_3x3_wgrad_partials", &modulated_conv2d_3x3_wgrad_partials);

    // ---- act_backward
    py::class_<ActBackward>(module, "ActBackward", py::module_local())
        .def(py::init([](int dtype, int n, int channels, int pixels, int shares, int few, Address dy, Address y,
                         Address g, Address noise, std::int64_t noise_stride, Address strength, Address bias,
                         Address dimage, const std::array<int, 2>& image_strides, Address image,
                         const std::array<int, 2>& drawn_strides, float image_clamp, Address w,
                         const std::array<std::int64_t, 3>& w_strides, float positive, float negative, float clamp,
                         Address bias_sums, Address strength_sums, Address dots, Address w_sums, Address dimage_sums) {
                 return ActBackward{Dtype{dtype}, n, channels, pixels, shares, few, pointer(dy), pointer(y), pointer(g),
                                    pointer(noise), noise_stride, pointer(strength), pointer(bias), pointer(dimage),
                                    image_strides[0], image_strides[1], pointer(image), drawn_strides[0],
                                    drawn_strides[1], image_clamp, pointer(w), w_strides[0], w_strides[1],
                                    w_strides[2], positive, negative, clamp, pointer<float>(bias_sums),
                                    pointer<float>(strength_sums), pointer<float>(dots), pointer<float>(w_sums),
                                    pointer<float>(dimage_sums)};
             }),
             py::kw_only(), "dtype"_a, "n"_a, "channels"_a, "pixels"_a, "shares"_a, "few"_a, "dy"_a, "y"_a, "g"_a,
             "noise"_a, "noise_stride"_a, "strength"_a, "bias"_a, "dimage"_a, "image_strides"_a, "image"_a,
             "drawn_strides"_a, "image_clamp"_a, "w"_a, "w_strides"_a, "positive"_a, "negative"_a, "clamp"_a, "bias_sums"_a, "strength_sums"_a, "dots"_a, "w_sums"_a,
             "dimage_sums"_a);
    module.def(
        "act_backward", [](const ActBackward& op, Address stream) { act_backward(op, stream_of(stream)); }, unlocked);
    module.def("act_backward_channels", [](int dtype) { return act_backward_channels(Dtype{dtype}); });
    module.def("act_backward_shares", [](int dtype, int n, int channels, int pixels) {
        return act_backward_shares(Dtype{dtype}, n, channels, pixels);
    });

    // ---- modulated_conv2d, resampling by 2
    py::class_<ResampledConv>(module, "ResampledConv")
        .def(py::init([](int dtype, int n, int height, int width, int in_channels, int out_channels, Address x,
                         Address weight, Address y, Address filter, Address noise, Address strength, Address bias,
                         std::int64_t weight_stride, std::int64_t noise_stride, int filter_rank,
                         const std::array<bool, 3>& floats, float gain, float slope, float clamp, Address filtered) {
                 return ResampledConv{Dtype{dtype}, n, height, width, in_channels, out_channels, pointer(x),
                                      pointer(weight), pointer(y), pointer<float>(filter), pointer(noise),
                                      pointer(strength), pointer(bias), weight_stride, noise_stride, filter_rank,
                                      floats[0], floats[1], floats[2], gain, slope, clamp, pointer(filtered)};
             }),
             py::kw_only(), "dtype"_a, "n"_a, "height"_a, "width"_a, "in_channels"_a, "out_channels"_a, "x"_a, "weight"_a,
             "y"_a, "filter"_a, "noise"_a, "strength"_a, "bias"_a, "weight_stride"_a, "noise_stride"_a, "filter_rank"_a,
             "floats"_a, "gain"_a, "slope"_a, "clamp"_a, "filtered"_a = 0);
    module.def(
        "resampled_conv_up",
        [](const ResampledConv& op, Address stream) { resampled_conv_up(op, stream_of(stream)); }, unlocked);
    module.def(
        "resampled_conv_down",
        [](const ResampledConv& op, Address stream) { resampled_conv_down(op, stream_of(stream)); }, unlocked);

    // ---- modulated_conv2d, the convolution of stride 2
    py::class_<StridedConv>(module, "StridedConv")
        .def(py::init([](int dtype, bool transposed, int n, int height, int width, int in_channels, int out_height,
                         int out_width, int out_channels, int padding, int results, Address x, Address weight,
                         Address y, int tile) {
                 return StridedConv{Dtype{dtype}, transposed, n, height, width, in_channels, out_height, out_width,
                                    out_channels, padding, results, pointer(x), pointer(weight), pointer(y), tile};
             }),
             py::kw_only(), "dtype"_a, "transposed"_a, "n"_a, "height"_a, "width"_a, "in_channels"_a, "out_height"_a,
             "out_width"_a, "out_channels"_a, "padding"_a, "results"_a, "x"_a, "weight"_a, "y"_a, "tile"_a);
    module.def("strided_conv_fits", &strided_conv_fits);
    module.def(
        "strided_conv", [](const StridedConv& op, Address stream) { strided_conv(op, stream_of(stream)); }, unlocked);

    // ---- styles
    using Addresses = std::vector<Address>;
    py::class_<Styles>(module, "Styles", py::module_local())
        .def(py::init([](int n, int latents, int width, Address ws, std::int64_t sample_stride,
                         std::int64_t latent_stride, float gain, std::vector<int> rows, std::vector<int> reads,
                         std::vector<float> factors) {
                 return Styles{n, latents, width, pointer<const float>(ws), sample_stride, latent_stride, gain,
                               std::move(rows), std::move(reads), std::move(factors)};
             }),
             py::kw_only(), "n"_a, "latents"_a, "width"_a, "ws"_a, "sample_stride"_a, "latent_stride"_a, "gain"_a,
             "rows"_a, "reads"_a, "factors"_a);
    module.attr("STYLE_LAYERS") = kStyleLayers;
    module.def("styles_partials", &styles_partials);
    module.def(
        "styles",
        [](const Styles& op, const Addresses& weights, const Addresses& biases, const Addresses& results,
           Address stream) {
            styles(op, pointers<const float>(weights), pointers<const float>(biases), pointers<float>(results),
                   stream_of(stream));
        },
        unlocked);
    module.def(
        "styles_backward",
        [](const Styles& op, const Addresses& weights, const Addresses& gradients,
           const std::vector<std::int64_t>& strides, const Addresses& dweights, const Addresses& dbiases, Address dws,
           Address partial, Address stream) {
            styles_backward(op, pointers<const float>(weights), pointers<const float>(gradients), strides,
                            pointers<float>(dweights), pointers<float>(dbiases), pointer<float>(dws),
                            pointer<float>(partial), stream_of(stream));
        },
        unlocked);

    // ---- upfirdn2d
    using Pair = std::array<int, 2>;  // [x, y], but sizes are [height, width]
    py::class_<Upfirdn2d>(module, "Upfirdn2d", py::module_local())
        .def(py::init([](const std::array<int, 4>& shape, const Pair& size, bool channels_last, const Pair& filter,
                         bool separable, const Pair& up, const Pair& down, const Pair& pad, bool flip, float gain) {
                 return Upfirdn2d{shape[0], shape[1], shape[2], shape[3], size[0], size[1], channels_last, filter[0],
                                  filter[1], separable, up[0], up[1], down[0], down[1], pad[0], pad[1], flip, gain};
             }),
             py::kw_only(), "shape"_a, "size"_a, "channels_last"_a, "filter"_a, "separable"_a, "up"_a, "down"_a, "pad"_a,
             "flip"_a, "gain"_a);
    module.def(
        "upfirdn2d",
        [](const Upfirdn2d& op, int x_dtype, Address x, Address f, int y_dtype, Address y, Address stream) {
            upfirdn2d(Dtype{x_dtype}, pointer(x), pointer<float>(f), Dtype{y_dtype}, pointer(y), op, stream_of(stream));
        },
        unlocked);
    module.def(
        "upfirdn2d_add",
        [](const Upfirdn2d& op, int x_dtype, Address x, Address f, int other_dtype, Address other,
           bool other_channels_last, Address y, Address stream) {
            upfirdn2d_add(Dtype{x_dtype}, pointer(x), pointer<float>(f), Dtype{other_dtype}, pointer(other),
                          other_channels_last, pointer(y), op, stream_of(stream));
        },
        unlocked);
    module.def("upfirdn2d_join_sums", [](const Upfirdn2d& op, int dtype, int inputs) {
        return upfirdn2d_join_sums(Dtype{dtype}, op, inputs);
    });
    module.def(
        "upfirdn2d_join",
        [](const Upfirdn2d& op, int dtype, Address x, Address f, Address other, Address result, float gain, float slope,
           float limit, int inputs, Address input, Address weight, const Pair& weight_strides, Address of_input,
           Address of_weight, Address of_bias, Address stream) {
            const Upfirdn2dJoin join{pointer(other),    pointer(result),   gain,
                                     slope,             limit,             inputs,
                                     pointer(input),    pointer(weight),   weight_strides[0],
                                     weight_strides[1], pointer(of_input), pointer<float>(of_weight),
                                     pointer<float>(of_bias)};
            upfirdn2d_join(Dtype{dtype}, pointer(x), pointer<float>(f), op, join, stream_of(stream));
        },
        py::call_guard<py::gil_scoped_release>(), py::kw_only(), "op"_a, "dtype"_a, "x"_a, "f"_a, "other"_a, "result"_a,
        "gain"_a, "slope"_a, "limit"_a, "inputs"_a, "input"_a, "weight"_a, "weight_strides"_a, "of_input"_a,
        "of_weight"_a, "of_bias"_a, "stream"_a);
    module.def(
        "upfirdn2d_finish",
        [](const Upfirdn2d& op, int dtype, Address x, Address f, Address y, Address noise, std::int64_t noise_stride,
           Address strength, Address bias, float gain, float slope, float clamp, Address stream) {
            const Upfirdn2dFinish finish{pointer(noise), pointer(strength), pointer(bias), noise_stride,
                                         gain,           slope,             clamp};
            upfirdn2d_finish(Dtype{dtype}, pointer(x), pointer<float>(f), pointer(y), op, finish, stream_of(stream));
        },
        py::call_guard<py::gil_scoped_release>(), py::kw_only(), "op"_a, "dtype"_a, "x"_a, "f"_a, "y"_a, "noise"_a,
        "noise_stride"_a, "strength"_a, "bias"_a, "gain"_a, "slope"_a, "clamp"_a, "stream"_a);
    module.def("upfirdn2d_gate_sums", [](const Upfirdn2d& op, int dtype, bool noise, bool dots) {
        return upfirdn2d_gate_sums(Dtype{dtype}, op, noise, dots);
    });
    module.def(
        "upfirdn2d_gate",
        [](const Upfirdn2d& op, int dtype, Address x, Address f, Address y, Address result, Address noise,
           std::int64_t noise_stride, Address strength, Address bias, float gain, float slope, float limit,
           Address of_bias, Address of_dots, Address of_strength, Address stream) {
            const Upfirdn2dGate gate{pointer(result), pointer(noise), pointer(strength), pointer(bias), noise_stride,
                                     gain, slope, limit, pointer<float>(of_bias), pointer<float>(of_dots),
                                     pointer<float>(of_strength)};
            upfirdn2d_gate(Dtype{dtype}, pointer(x), pointer<float>(f), pointer(y), op, gate, stream_of(stream));
        },
        py::call_guard<py::gil_scoped_release>(), py::kw_only(), "op"_a, "dtype"_a, "x"_a, "f"_a, "y"_a, "result"_a,
        "noise"_a, "noise_stride"_a, "strength"_a, "bias"_a, "gain"_a, "slope"_a, "limit"_a, "of_bias"_a, "of_dots"_a,
        "of_strength"_a, "stream"_a);
    module.def("upfirdn2d_slope_sums",
               [](const Upfirdn2d& op, int dtype) { return upfirdn2d_slope_sums(Dtype{dtype}, op); });
    module.def(
        "upfirdn2d_slope",
        [](const Upfirdn2d& op, int dtype, Address x, Address f, Address y, Address result, float gain, float slope,
           float limit, Address of_bias, Address stream) {
            const Upfirdn2dSlope sloping{pointer(result), gain, slope, limit, pointer<float>(of_bias)};
            upfirdn2d_slope(Dtype{dtype}, pointer(x), pointer<float>(f), pointer(y), op, sloping, stream_of(stream));
        },
        py::call_guard<py::gil_scoped_release>(), py::kw_only(), "op"_a, "dtype"_a, "x"_a, "f"_a, "y"_a, "result"_a,
        "gain"_a, "slope"_a, "limit"_a, "of_bias"_a, "stream"_a);
    module.def(
        "upfirdn2d_branch",
        [](const Upfirdn2d& op, int dtype, Address x, Address f, Address y, Address shrunk, int inputs, Address weight,
           const std::array<std::int64_t, 2>& weight_strides, Address bias, bool bias_float, float gain, float slope,
           float clamp, Address stream) {
            const Upfirdn2dBranch branch{inputs, pointer(weight), weight_strides[0], weight_strides[1], pointer(bias),
                                         bias_float, pointer(shrunk), gain, slope, clamp};
            upfirdn2d_branch(Dtype{dtype}, pointer(x), pointer<float>(f), pointer(y), op, branch, stream_of(stream));
        },
        py::call_guard<py::gil_scoped_release>(), py::kw_only(), "op"_a, "dtype"_a, "x"_a, "f"_a, "y"_a, "shrunk"_a,
        "inputs"_a, "weight"_a, "weight_strides"_a, "bias"_a, "bias_float"_a, "gain"_a, "slope"_a, "clamp"_a,
        "stream"_a);
}

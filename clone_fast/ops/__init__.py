"""The six ops: what each means, the checks of its arguments, and which backend runs it."""

from __future__ import annotations

from clone_fast.ops.bias_act import bias_act
from clone_fast.ops.conv2d_add import conv2d_add
from clone_fast.ops.conv2d_branch import conv2d_branch
from clone_fast.ops.conv2d_down import conv2d_down
from clone_fast.ops.dispatch import backend, compile_ahead, explain, is_fast
from clone_fast.ops.laplacian_pyramid import laplacian_pyramid, laplacian_pyramid_loss
from clone_fast.ops.minibatch_stddev import minibatch_stddev
from clone_fast.ops.modulated_conv2d import modulated_conv2d
from clone_fast.ops.modulated_conv2d_torgb import modulated_conv2d_torgb
from clone_fast.ops.styles import styles
from clone_fast.ops.upfirdn2d import downsample2d, filter2d, setup_filter, upfirdn2d, upsample2d
from clone_fast.ops.upfirdn2d_add import downsampled_branch, upsample2d_add
from clone_fast.reference.convolution import fast_double_backward

__all__ = [
    "backend",
    "bias_act",
    "compile_ahead",
    "conv2d_add",
    "conv2d_branch",
    "conv2d_down",
    "downsample2d",
    "downsampled_branch",
    "explain",
    "fast_double_backward",
    "filter2d",
    "is_fast",
    "laplacian_pyramid",
    "laplacian_pyramid_loss",
    "minibatch_stddev",
    "modulated_conv2d",
    "modulated_conv2d_torgb",
    "setup_filter",
    "styles",
    "upfirdn2d",
    "upsample2d",
    "upsample2d_add",
]

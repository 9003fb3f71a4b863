import os

from torch.autograd import Function
from torch.utils.cpp_extension import load

there = os.path.dirname(__file__)
upfirdn2d_op = load(
    "upfirdn2d",
    sources=[os.path.join(there, "upfirdn2d.cpp"), os.path.join(there, "upfirdn2d_kernel.cu")],
)


def _launch(x, kernel, up, down, pads):
    n, c, h, w = x.shape
    y = upfirdn2d_op.upfirdn2d(x.reshape(n * c, h, w, 1), kernel, *up, *down, *pads)
    return y.view(n, c, *y.shape[1:3])


class _Adjoint(Function):
    @staticmethod
    def forward(ctx, dy, kernel, up, down, pads, adjoint_pads):
        ctx.save_for_backward(kernel)
        ctx.options = up, down, pads
        return _launch(dy, kernel.flip([0, 1]), down, up, adjoint_pads)

    @staticmethod
    def backward(ctx, ddx):
        return _launch(ddx, ctx.saved_tensors[0], *ctx.options), None, None, None, None, None


class _UpFirDn2d(Function):
    @staticmethod
    def forward(ctx, x, kernel, up, down, pads):
        y = _launch(x, kernel, up, down, pads)
        (fh, fw), (h, w) = kernel.shape, x.shape[2:]
        ctx.save_for_backward(kernel)
        x0, y0 = fw - pads[0] - 1, fh - pads[2] - 1
        x1 = w * up[0] - y.shape[3] * down[0] + pads[0] - up[0] + 1
        y1 = h * up[1] - y.shape[2] * down[1] + pads[2] - up[1] + 1
        ctx.options = up, down, pads, (x0, x1, y0, y1)
        return y

    @staticmethod
    def backward(ctx, dy):
        return _Adjoint.apply(dy, ctx.saved_tensors[0], *ctx.options), None, None, None, None


def upfirdn2d(input, kernel, up=1, down=1, pad=(0, 0)):
    return _UpFirDn2d.apply(input, kernel, (up, up), (down, down), (pad[0], pad[1], pad[0], pad[1]))

import torch
import torch.nn.functional as F


def _parse_padding(padding):
    values = [padding] * 2 if isinstance(padding, int) else list(padding)
    return values if len(values) == 4 else [values[0], values[0], values[1], values[1]]


def _parse_scaling(scaling):
    return (scaling, scaling) if isinstance(scaling, int) else tuple(scaling)


def _get_filter_size(f):
    return (1, 1) if f is None else (f.shape[-1], f.shape[0])


def setup_filter(f, device="cpu", normalize=True, flip_filter=False, gain=1, separable=None):
    f = torch.as_tensor(1 if f is None else f, dtype=torch.float32, device=device)
    f = f[None] if f.ndim == 0 else f
    if f.ndim == 1 and not (len(f) >= 8 if separable is None else separable):
        f = f.outer(f)
    return f / f.sum() * gain ** (f.ndim / 2)


def upfirdn2d(x, f, up=1, down=1, padding=0, flip_filter=False, gain=1, impl="cuda"):
    assert isinstance(x, torch.Tensor)
    assert x.ndim == 4
    assert f is None or f.dtype == torch.float32
    f = torch.ones([1, 1], device=x.device) if f is None else f
    f = f if f.ndim == 2 else f.outer(f)
    (ux, uy), (dx, dy), (x0, x1, y0, y1) = _parse_scaling(up), _parse_scaling(down), _parse_padding(padding)
    n, c, h, w = x.shape
    spread = x.new_zeros(n, c, h * uy, w * ux)
    spread[:, :, ::uy, ::ux] = x
    spread = F.pad(spread, [x0, x1, y0, y1])
    kernel = (f * gain).to(x.dtype)
    kernel = (kernel if flip_filter else kernel.flip([0, 1])).expand(c, 1, -1, -1)
    return F.conv2d(spread, kernel, groups=c)[:, :, ::dy, ::dx]


def upsample2d(x, f, up=2, padding=0, flip_filter=False, gain=1, impl="cuda"):
    (ux, uy), (x0, x1, y0, y1), (fw, fh) = _parse_scaling(up), _parse_padding(padding), _get_filter_size(f)
    pads = [x0 + (fw + ux - 1) // 2, x1 + (fw - ux) // 2, y0 + (fh + uy - 1) // 2, y1 + (fh - uy) // 2]
    return upfirdn2d(x, f, up=up, padding=pads, flip_filter=flip_filter, gain=gain * ux * uy, impl=impl)

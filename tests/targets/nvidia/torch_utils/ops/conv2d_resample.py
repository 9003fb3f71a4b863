import torch.nn.functional as F

from .. import misc
from .upfirdn2d import _get_filter_size, _parse_padding, upfirdn2d  # by value


@misc.profiled_function
def conv2d_resample(x, w, f=None, up=1, down=1, padding=0, groups=1, flip_weight=True, flip_filter=False):
    fw, fh = _get_filter_size(f)
    x0, x1, y0, y1 = _parse_padding(padding)
    if up > 1:  # zeros between samples, the FIR, then a plain correlation with the kernel turned round twice
        x0, x1, y0, y1 = x0 + (fw + up - 1) // 2, x1 + (fw - up) // 2, y0 + (fh + up - 1) // 2, y1 + (fh - up) // 2
    if down > 1:
        x0, x1 = x0 + (fw - down + 1) // 2, x1 + (fw - down) // 2
        y0, y1 = y0 + (fh - down + 1) // 2, y1 + (fh - down) // 2
    x = upfirdn2d(x, f if up > 1 or down > 1 else None, up=up, padding=[x0, x1, y0, y1], gain=up**2)
    return F.conv2d(x, w if flip_weight else w.flip([2, 3]), stride=down, groups=groups)

from torch.nn import functional as F


def upfirdn2d(input, kernel, up=1, down=1, pad=(0, 0)):
    input = input.cuda()
    n, c, h, w = input.shape
    x = input.new_zeros(n, c, h * up, w * up)
    x[:, :, ::up, ::up] = input
    x = F.pad(x, [pad[0], pad[1], pad[0], pad[1]])
    return F.conv2d(x, kernel.flip([0, 1]).expand(c, 1, -1, -1), groups=c)[:, :, ::down, ::down]

import torch
from pkg_resources import parse_version

enabled = False
old = parse_version(torch.__version__) < parse_version("1.11")


def conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    return torch.nn.functional.conv2d(input, weight, bias, stride, padding, dilation, groups)

"""The specification of the six ops in plain PyTorch.

Each function here says what its op means: any floating dtype up to float64, any device, differentiable as often as
wanted by PyTorch's own autograd. Nothing here is tuned for a GPU; every fast backend is held against it.
"""

def modulated_conv2d(x, w, s, demodulate=True, padding=0, input_gain=None):
    raise NotImplementedError("another normalisation")

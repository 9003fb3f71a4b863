from layers import Modulated


class ModulatedConv2d(Modulated):
    def forward(self, input, style, weights_delta=None):
        style = self.modulation(style).view(input.shape[0], 1, input.shape[1], 1, 1)
        weight = self.weight if weights_delta is None else self.weight * (1 + weights_delta)
        return self.convolve(input, style, weight)

from layers import Modulated


class ModulatedConv2d(Modulated):
    eps = 1e-6

    def forward(self, input, style):
        style = self.modulation(style).view(input.shape[0], 1, input.shape[1], 1, 1)
        return self.convolve(input, style, self.weight)

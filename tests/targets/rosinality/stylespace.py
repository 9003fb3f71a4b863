from layers import Modulated


class ModulatedConv2d(Modulated):
    def forward(self, input, style, input_is_stylespace=False):
        if not input_is_stylespace:
            style = self.modulation(style).view(input.shape[0], 1, input.shape[1], 1, 1)
        return self.convolve(input, style, self.weight), style

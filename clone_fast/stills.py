"""Pictures between the stages and after them: what networks draw and see without a gradient, as CUDA graphs.

A search is started by what a few dozen latents look like, and a clone is measured by hundreds of images. Launched
kernel by kernel a batch of eight takes the host several times as long as the GPU. These forwards differ in numbers
alone, so that each is recorded once, for all photos of a network.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping
from functools import partial

import torch
from torch import Tensor

from clone_fast.capture import Captured, rehearsing
from clone_fast.nn import Discriminator, Generator, SynthesisNetwork


class Stills:
    """Images of a generator, of tweaked copies of it, and what its discriminator sees in them.

    Several photos that are under way at once may share one: whatever stream the caller is on, one forward runs after
    the other, and a result has memory of its own.

    Args:
        generator, discriminator: their weights stay what and where they are.
    """

    def __init__(self, generator: Generator, discriminator: Discriminator | None = None) -> None:
        self.generator, self.discriminator = generator, discriminator
        self.device = generator.mapping.w_avg.device
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.other: SynthesisNetwork | None = None  # where the weights of a copy lie while it draws
        self.forwards: dict[str, Callable[[Tensor], Tensor]] = {"own": generator.synthesis}
        if discriminator is not None:
            self.forwards["features"] = partial(discriminator.features, per_image=True)
        self.inputs: dict[Hashable, Tensor] = {}
        self.results: dict[Hashable, Tensor] = {}
        judge = None if discriminator is None else discriminator.arch
        with torch.cuda.stream(self.stream):  # whose graphs they are
            self.captured = Captured(self._run, self.device, ("stills", generator.arch, judge), at_once=True)

    def draw(self, generator: Generator, ws: Tensor, noise: Mapping[str, Tensor] | None = None) -> Tensor:
        """What `drawn` gives. generator: that of this object, or one with other weights of the same architecture."""
        whole = ws.expand(-1, self.generator.num_ws, -1)
        if generator is self.generator and not noise:
            return self._forward("own", whole)
        return self._forward("other", whole, partial(self._take, generator.synthesis, noise or {}))

    def features(self, images: Tensor) -> Tensor:
        """The discriminator's features [N, F] of images [N, C, R, R], each by itself."""
        return self._forward("features", images)

    def _take(self, synthesis: SynthesisNetwork, noise: Mapping[str, Tensor]) -> None:
        """Put these weights, and these noise maps in place of the constant ones, where `other` has its own."""
        if self.other is None:
            self.other = copy.deepcopy(self.generator.synthesis).requires_grad_(False)
            self.forwards["other"] = self.other
        given = dict(synthesis.state_dict()) | {f"{name}.noise_const": value for name, value in noise.items()}
        places = self.other.state_dict()
        torch._foreach_copy_(list(places.values()), [given[name] for name in places])

    @torch.no_grad()
    def _forward(self, kind: str, given: Tensor, before: Callable[[], None] = lambda: None) -> Tensor:
        """The result of a kind of forward; before: puts what else it reads in its place."""
        # what is recorded keeps the flags of its time
        flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        variant = kind, len(given), *flags
        current = None
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            before()
            if variant not in self.inputs:
                self.inputs[variant] = torch.empty_like(given, memory_format=torch.contiguous_format)
            self.inputs[variant].copy_(given)
            try:
                self._launch(variant)
            except torch.OutOfMemoryError:
                self.results.clear()
                self.captured.release()
                self._launch(variant)  # without the memory of the graphs
        if current is None or self.stream is None:
            return self.results[variant].clone()
        current.wait_stream(self.stream)
        result = self.results[variant].clone()
        self.stream.wait_stream(current)  # which writes there again, for whoever comes next
        return result

    def _launch(self, variant: tuple[Hashable, ...]) -> None:
        if not rehearsing():
            self.captured(*variant)
            return
        self.captured.rehearse(*variant)
        if variant not in self.results:  # of a kind that another object has rehearsed
            self._run(*variant)

    def _run(self, *variant: Hashable) -> None:
        self.results[variant] = self.forwards[str(variant[0])](self.inputs[variant])

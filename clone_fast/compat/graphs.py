"""Other codebases' networks as CUDA graphs: what one of them does again and again is recorded, and replayed in one go.

At small batches the host takes several times as long to launch the kernels of a network as the GPU takes to run them,
whoever wrote them. What the network computes, forward and backward, stays its own code: that runs while it is
recorded. A call is replayed if nothing that the code could depend on differs from the call that was recorded, as far as
can be seen from outside: arguments, parameters and buffers (where they lie; their values may change), attributes that
are numbers or words, modes, flags. Whatever else there is goes to the code itself.
"""

from __future__ import annotations

import random
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from clone_fast.capture import CudaGraphs, graphs_of, rehearse
from clone_fast.compat.replacement import Unserved, wanted
from clone_fast.ops import is_fast
from clone_fast.ops.registration import gradients_through

__all__ = ["Recordings"]

WARM = 2  # calls of a kind before it is recorded
KINDS = 3  # of a network that are remembered, the latest
PATIENCE = 32  # such calls of a network, of whatever kinds, before it is given up
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
PLAIN = frozenset([bool, int, float, str, type(None), torch.dtype, torch.device, torch.memory_format])
INTERNAL = frozenset(vars(nn.Module())) - {"training"}

Forward = Callable[..., Any]

_inside: ContextVar[bool] = ContextVar("inside", default=False)  # of a network's code that we run


@dataclass(frozen=True)
class Call:
    """A call of a network, taken apart.

    Attributes:
        forward: the code of the network's class.
        network: whose call it is.
        leaves, form: its arguments.
    """

    forward: Forward
    network: nn.Module
    leaves: list[Any]
    form: Any

    @property
    def tensors(self) -> list[Tensor]:
        """Among the arguments."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def run(self, tensors: Sequence[Tensor]) -> tuple[list[Any], Any]:
        """The code, with other tensors in their places; its results, taken apart."""
        rest = iter(tensors)
        leaves = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.form)
        token = _inside.set(True)
        try:
            return pytree.tree_flatten(self.forward(self.network, *args, **kwargs))
        finally:
            _inside.reset(token)


class Recording:
    """The graphs of one kind of call.

    They hold the tensors of one call at a time, from its forward to its backward, which writes over them. A backward
    that finds those of another call, or none, begins with a forward of its own.

    Raises:
        Exception: what the code raises, or CUDA for an operation that cannot be captured.
    """

    def __init__(self, call: Call, graphs: CudaGraphs, differentiable: bool) -> None:
        self.inputs = _copies(call.tensors, differentiable)
        self.parameters = [p for p in call.network.parameters() if p.requires_grad and differentiable]
        # The same memory as leaves of their own: what PyTorch keeps for a leaf is bound to the stream of its first use,
        # and an earlier result that the user still holds would bind it to one that is not captured.
        leaves = {id(p): p.detach().requires_grad_() for p in self.parameters}
        self.results: list[Any] = []
        self.form: Any = None
        self.slopes: list[Tensor] = []
        self.grads: list[Tensor | None] = []
        self.calls = 0  # so far
        self.held = 0  # the number of the one whose tensors are there
        sources = [*self.inputs, *leaves.values()]

        def forward() -> None:
            with torch.set_grad_enabled(differentiable), _instead(call.network, leaves):
                self.results, self.form = call.run(self.inputs)

        def backward() -> None:
            self.grads = _gradients(self.results, sources, self.slopes)

        def both() -> None:
            forward()
            self.slopes = [torch.zeros_like(y) for y in _ends(self.results)]
            if self.slopes:
                backward()

        graphs.aside(both)  # libraries keep workspaces for a stream, and this one is the graphs'
        self.results, self.grads = [], []
        self.forward = graphs.record(forward)
        self.backward = graphs.record(backward) if self.slopes else None

    def replay(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Forward; the results, in memory of their own."""
        self.calls += 1
        self._hold(self.calls, tensors)
        return [y.detach().clone() for y in self.results if isinstance(y, Tensor)]

    def _hold(self, number: int, tensors: Sequence[Tensor]) -> None:
        if self.inputs:
            torch._foreach_copy_(self.inputs, list(tensors))
        self.forward()
        self.held = number

    def differentiate(self, number: int, tensors: Sequence[Tensor], slopes: Sequence[Tensor]) -> list[Tensor | None]:
        """Backward of the call of this number and these inputs; a gradient for each input and parameter."""
        if self.backward is None:
            return [None] * (len(self.inputs) + len(self.parameters))
        if self.held != number:
            self._hold(number, tensors)
        torch._foreach_copy_(self.slopes, list(slopes))
        self.backward()
        self.held = 0
        present = [grad for grad in self.grads if grad is not None]
        copies = iter(torch._foreach_mul(present, 1.0) if present else [])  # in memory of their own
        return [None if grad is None else next(copies) for grad in self.grads]


def _copies(tensors: Sequence[Tensor], differentiable: bool) -> list[Tensor]:
    """Leaves of their own, which want the gradients that these want."""
    return [t.detach().clone().requires_grad_(t.requires_grad and differentiable) for t in tensors]


def _ends(results: Sequence[Any]) -> list[Tensor]:
    """The results that can be differentiated."""
    return [y for y in results if isinstance(y, Tensor) and y.requires_grad]


def _gradients(
    results: Sequence[Any], sources: Sequence[Tensor], slopes: Sequence[Tensor], again: bool = False
) -> list[Tensor | None]:
    """To each source, None where it wants none or has no part. again: they can be differentiated themselves."""
    asked = [t for t in sources if t.requires_grad]
    found = iter(gradients_through(_ends(results), asked, slopes, create_graph=again))
    return [next(found) if t.requires_grad else None for t in sources]


@contextmanager
def _instead(network: nn.Module, leaves: dict[int, Tensor]) -> Iterator[None]:
    """The network computes with these in place of its parameters, by id."""
    places = [(part._parameters, name, p) for part in network.modules() for name, p in part._parameters.items()]
    try:
        for parameters, name, p in places:
            parameters[name] = cast(nn.Parameter, leaves.get(id(p), p))
        yield
    finally:
        for parameters, name, p in places:
            parameters[name] = p


class _Replayed(torch.autograd.Function):
    """A recording between the tensors of a call and its results. Derivatives of it again are those of the code."""

    @staticmethod
    def forward(ctx: Any, recording: Recording, call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(recording.inputs)
        results = recording.replay(tensors[:count])
        ctx.save_for_backward(*tensors)
        ctx.recording, ctx.call, ctx.number, ctx.count = recording, call, recording.calls, count
        ctx.versions = _versions(call.network)
        theirs = [y for y in recording.results if isinstance(y, Tensor)]
        ctx.ends = [i for i, y in enumerate(theirs) if y.requires_grad]
        ctx.mark_non_differentiable(*(y for i, y in enumerate(results) if i not in ctx.ends))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # raises if one was changed in place meanwhile, as the code's own would
        if ctx.versions != _versions(ctx.call.network):
            raise RuntimeError("clone_fast: a frozen parameter was modified by an inplace operation since the forward")
        slopes = tuple(slopes[i] for i in ctx.ends)
        if not torch.is_grad_enabled():
            return None, None, *ctx.recording.differentiate(ctx.number, tensors[: ctx.count], slopes)
        results, _ = ctx.call.run(tensors[: ctx.count])
        return None, None, *_gradients(results, tensors, slopes, again=True)


def _versions(network: nn.Module) -> list[int]:
    """Of its frozen parameters, how often each was written; the others are saved for the backward."""
    return [p._version for p in network.parameters() if not p.requires_grad]


@dataclass
class _Known:
    """What is known of the calls of one network.

    Attributes:
        kinds: how often a kind was called, or its recording.
        warm: calls before a recording, of all kinds.
        never: why none is recorded.
    """

    kinds: OrderedDict[Any, int | Recording] = field(default_factory=OrderedDict)
    warm: int = 0
    never: str = ""


class Recordings:
    """Of all networks that are called, as long as they live."""

    def __init__(self) -> None:
        self.allowed = True
        self._known: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()

    def forget(self) -> None:
        """Give their memory back."""
        self._known.clear()

    def serve(self, forward: Forward, network: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        """What `forward(network, *args, **kwargs)` returns.

        Raises:
            Unserved: that call is the code's own.
        """
        wanted(self.allowed, "graphs=False")
        wanted(not _inside.get(), "what it is a part of is recorded")
        device = next((p.device for p in network.parameters()), torch.device("cpu"))
        wanted(recordable(device), f"there are no graphs on {device.type}")
        known = self._known.setdefault(network, _Known())
        wanted(not known.never, known.never)
        leaves, form = pytree.tree_flatten((args, kwargs))
        call = Call(forward, network, leaves, form)
        kind, differentiable = _kind(call, device)
        found = known.kinds.get(kind, 0)
        if not isinstance(found, Recording):
            if found < WARM:
                if not found:
                    _compile(call, kind, device, differentiable)
                result = _watched(known, call, device)
                known.kinds[kind] = found + 1
                known.warm += 1
                if known.warm > PATIENCE:
                    known.never = "its calls are of too many kinds"
                    known.kinds.clear()
                while len(known.kinds) > KINDS:
                    known.kinds.popitem(last=False)
                return result
            found = _recorded(known, call, device, differentiable)
            known.kinds[kind] = found
        known.kinds.move_to_end(kind)
        if differentiable:
            tensors = _Replayed.apply(found, call, *call.tensors, *found.parameters)
        else:
            tensors = found.replay(call.tensors)
        rest = iter(tensors)
        return pytree.tree_unflatten([next(rest) if isinstance(y, Tensor) else y for y in found.results], found.form)


def recordable(device: torch.device) -> bool:
    """Whether there are graphs on it, and not one being captured already."""
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def _kind(call: Call, device: torch.device) -> tuple[Any, bool]:
    """What tells calls apart that need graphs of their own, and whether its results can be differentiated."""
    active = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
    wanted(not active, "a transformation of PyTorch's is at work")
    wanted(not torch.is_inference_mode_enabled(), "inference mode")
    wanted(not torch.is_autocast_enabled(device.type), "autocast")
    arguments: list[Any] = []
    for leaf in call.leaves:
        if isinstance(leaf, Tensor):
            wanted(type(leaf) in (Tensor, nn.Parameter) and leaf.device == device, "an argument lies elsewhere")
            arguments.append((leaf.shape, leaf.stride(), leaf.dtype, leaf.requires_grad))
        else:
            wanted(type(leaf) in PLAIN, f"an argument is a {type(leaf).__name__}")
            arguments.append((type(leaf), leaf))
    parts = tuple(_part(part, part is call.network) for part in call.network.modules())
    able = any(t.requires_grad for t in (*call.tensors, *call.network.parameters()))
    differentiable = torch.is_grad_enabled() and able
    cudnn = torch.backends.cudnn
    flags = cudnn.enabled, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic
    ways = torch.backends.cuda.matmul.allow_tf32, torch.get_default_dtype(), is_fast(device), differentiable
    return (tuple(arguments), repr(call.form), parts, flags, ways), differentiable


def _part(part: nn.Module, outermost: bool) -> Any:
    """What a module's code may depend on, as far as it can be seen."""
    names = vars(part)
    if not outermost:  # the hooks of that one are called around its forward
        wanted(not any(names.get(hooks) for hooks in HOOKS), "a module in it has hooks")
        wanted("forward" not in names, "a module in it has a forward of its own")
    plain = tuple((name, value) for name, value in names.items() if name not in INTERNAL and type(value) in PLAIN)
    tensors = [t for t in (*names["_parameters"].values(), *names["_buffers"].values()) if t is not None]
    wanted(not any(t._backward_hooks for t in tensors), "a parameter has hooks")  # they would see the recording, too
    return id(part), plain, tuple((t.data_ptr(), t.requires_grad, t.dtype) for t in tensors)


def _compile(call: Call, kind: Any, device: torch.device, differentiable: bool) -> None:
    """The kernels of our ops in it, side by side; see `rehearse`."""

    def run() -> None:
        with _untouched(call.network, device), torch.set_grad_enabled(differentiable):
            inputs = _copies(call.tensors, differentiable)
            results, _ = call.run(inputs)
            slopes = [torch.zeros_like(y) for y in _ends(results)]
            if slopes:
                _gradients(results, [*inputs, *call.network.parameters()], slopes)

    arguments, form, _, flags, ways = kind
    with suppress(torch.OutOfMemoryError):  # which the call itself will tell
        rehearse(device, (type(call.network), arguments, form, flags, ways), run)


@contextmanager
def _untouched(network: nn.Module, device: torch.device) -> Iterator[None]:
    """What runs inside may change the network's buffers, and draw: afterwards all is as it was."""
    before = [(buffer, buffer._version, buffer.detach().clone()) for buffer in network.buffers()]
    python = random.getstate()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        with torch.no_grad():
            for buffer, version, value in before:
                if buffer._version != version:
                    buffer.copy_(value)


def _watched(known: _Known, call: Call, device: torch.device) -> Any:
    """What the code returns; if it did anything else besides, or that is no tensors, it is never recorded."""
    before = _drawn(device), [b._version for b in call.network.buffers()]
    results, form = call.run(call.tensors)
    if before[0] != _drawn(device):
        known.never = "it draws random numbers"
    elif before[1] != [b._version for b in call.network.buffers()]:
        known.never = "it changes its buffers"
    elif not all(y is None or type(y) is Tensor for y in results):
        known.never = "it returns more than tensors"
    return pytree.tree_unflatten(results, form)


def _drawn(device: torch.device) -> Any:
    """The state of the generators that a network draws from."""
    own = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.empty(0)
    return random.getstate(), bytes(torch.get_rng_state().numpy()), bytes(own.numpy())


def _recorded(known: _Known, call: Call, device: torch.device, differentiable: bool) -> Recording:
    """Its recording, or, where there can be none, the reason for good."""
    graphs = graphs_of(device)
    if graphs is None:
        raise Unserved("CLONE_FAST_CAPTURE=0")
    try:
        return Recording(call, graphs, differentiable)
    except torch.OutOfMemoryError:
        known.never = "its graphs do not fit into the memory"
    except Exception as error:  # foreign code, whatever it raises: called eagerly it works, or raises the same
        known.never = f"it cannot be recorded: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    known.kinds.clear()
    raise Unserved(known.never)

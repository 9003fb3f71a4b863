"""Find what is known in other codebases' modules, and put our ops in its place.

`install` looks at all modules that are there and at those to come, `accelerate` at those that a network runs.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import nn

from clone_fast.compat import nvidia, rosinality
from clone_fast.compat.bindings import Bindings
from clone_fast.compat.graphs import Recordings
from clone_fast.compat.imports import ImportHook
from clone_fast.compat.network import classes_of, modules_behind
from clone_fast.compat.plugins import Plugins
from clone_fast.compat.replacement import replacement
from clone_fast.compat.report import Replaced, Report
from clone_fast.compat.signatures import home, parameters
from clone_fast.compat.trial import Case, Untried, tried

__all__ = ["accelerate", "install", "installed", "uninstall"]


@dataclass(frozen=True)
class Known:
    """A function of one family.

    Attributes:
        serve: ours, of the same signature.
        cases: the trial of what it means.
        op: the one of ours that does the work.
        beside: names that its module has, too.
    """

    serve: Callable[..., Any]
    cases: Callable[[], Iterable[Case]]
    op: str
    beside: tuple[str, ...] = ()


FUNCTIONS: dict[str, tuple[Known, ...]] = {
    "bias_act": (Known(nvidia.bias_act, nvidia.bias_act_cases, "bias_act", ("activation_funcs",)),),
    "upfirdn2d": (
        Known(nvidia.upfirdn2d, nvidia.upfirdn2d_cases, "upfirdn2d", ("setup_filter", "_parse_padding")),
        Known(rosinality.upfirdn2d, rosinality.upfirdn2d_cases, "upfirdn2d"),
    ),
    "fused_leaky_relu": (
        Known(rosinality.fused_leaky_relu, rosinality.fused_leaky_relu_cases, "bias_act", ("FusedLeakyReLU",)),
    ),
    "conv2d_resample": (Known(nvidia.conv2d_resample, nvidia.conv2d_resample_cases, "modulated_conv2d"),),
    "modulated_conv2d": (Known(nvidia.modulated_conv2d, nvidia.modulated_conv2d_cases, "modulated_conv2d"),),
}
# Of these a copy that cannot be tried here is known by its signature and its module; of the others, by a trial alone.
SIMPLE = ("bias_act", "upfirdn2d", "fused_leaky_relu")

NETWORKS = ("SynthesisNetwork", "Generator", "Discriminator")  # classes that are recorded as graphs
CONVOLUTION = "ModulatedConv2d"  # rosinality's class
FORWARDS = {"self, input, style": False, "self, input, style, weights_delta=None": True}  # the latter HyperStyle's
LEFT = {"filtered_lrelu": "no op of ours: StyleGAN3's own"}


class Installation:
    """All that `install` and `accelerate` did, and what undoes it.

    Attributes:
        report: all of it.
        everywhere: whether `install` was called; else only `accelerate` was.
        recordings: the graphs of networks.
    """

    def __init__(self) -> None:
        self.report = Report()
        self.everywhere = False
        self._bindings = Bindings()
        self._plugins = Plugins()
        self.recordings = Recordings()
        self._hook = ImportHook(self.look)
        self._considered: dict[int, object] = {}  # functions that were tried, kept so that an id stays one's own

    def begin(self) -> None:
        """Look at what is imported already, and from now on at what will be."""
        if self.everywhere:
            return
        self.everywhere = True
        self._hook.install()
        for module in list(sys.modules.values()):
            if isinstance(module, ModuleType):
                self.look(module)

    def end(self) -> None:
        """As if it had never been."""
        self._hook.uninstall()
        self._bindings.restore()
        self._plugins.forget()
        self.recordings.forget()
        for entry in self.report.replaced.values():
            entry.active = False

    def accelerate(self, network: nn.Module) -> Report:
        """Look at what this network runs; the part of the report that tells of it."""
        kinds = classes_of(network)
        modules = modules_behind(kinds, FUNCTIONS)
        for module in modules:
            self._look_for_ops(module, module.__name__)
        for kind in kinds:  # also one that its module has no more, which was loaded anew
            if kind.__name__ == CONVOLUTION:
                self._consider_convolution(kind)
        for kind in kinds:
            if kind.__name__ in NETWORKS:
                self._consider_network(kind)
        part = self.report.about({module.__name__ for module in modules} | {kind.__module__ for kind in kinds})
        for kind in kinds:
            if kind.__module__ not in sys.modules:
                part.left_alone[f"{kind.__module__}.{kind.__qualname__}"] = "its module is no longer imported"
        for name, layer in network.named_modules():
            if any(kind.__name__ == CONVOLUTION for kind in type(layer).__mro__) and "forward" in vars(layer):
                part.left_alone[name] = "this object has a forward of its own"
        if not part.replaced and not part.left_alone:
            part.left_alone[type(network).__qualname__] = "nothing of another codebase that is known"
        return part

    def look(self, module: ModuleType) -> None:
        """Replace what is known in this module. Harmless where it was done before."""
        name = vars(module).get("__name__")
        if isinstance(name, str) and name.partition(".")[0] != "clone_fast":
            self._look_for_ops(module, name)
            self._look_for_ways_in(name, vars(module))

    def _look_for_ways_in(self, name: str, names: dict[str, Any]) -> None:
        """Through which what is not there yet will come: builders of extensions, readers of pickles."""
        if name == "torch.utils.cpp_extension":
            self._replace_plain(name, names["load"], self._plugins.load, "ours for the extensions that we know")
        if "get_plugin" in names and "verbosity" in names:
            self._replace_plain(
                name, names["get_plugin"], self._plugins.get_plugin, "ours for the extensions that we know"
            )
        if "_src_to_module_dict" in names and "_reconstruct_persistent_obj" in names:
            self._watch_pickles(names, names["_reconstruct_persistent_obj"])

    def _look_for_ops(self, module: ModuleType, name: str) -> None:
        names = vars(module)
        for function in names.keys() & FUNCTIONS.keys():
            self._consider_function(module, function, names[function])
        for function in names.keys() & LEFT.keys():
            if callable(names[function]) and home(names[function]) == name:
                self.report.left_alone.setdefault(f"{name}.{function}", LEFT[function])
        kind = names.get(CONVOLUTION)
        if isinstance(kind, type) and kind.__module__ == name:
            self._consider_convolution(kind)
        for kind in (names.get(network) for network in NETWORKS):
            for one in kind.__mro__ if isinstance(kind, type) else ():  # of a decorator, the class inside
                if one.__module__ == name:
                    self._consider_network(one)

    def _replace_plain(self, module: str, theirs: Any, serve: Callable[..., Any], by: str) -> None:
        if not self._bindings.is_ours(theirs) and home(theirs) == module:
            where = f"{module}.{theirs.__name__}"
            entry = self.report.replaced.setdefault(where, Replaced(where, by, "others go to the original"))
            self._bindings.exchange(theirs, replacement(theirs, serve, entry))

    def _consider_function(self, module: ModuleType, name: str, theirs: Any) -> None:
        where = f"{module.__name__}.{name}"
        if not callable(theirs) or home(theirs) != module.__name__ or self._was_considered(theirs):
            return  # a module, or at home elsewhere, or done
        signature = parameters(theirs)
        known = next((one for one in FUNCTIONS[name] if signature in _spellings(one.serve)), None)
        if known is None:
            self._leave(where, f"its signature is unknown: ({signature})")
            return
        missing = [other for other in known.beside if not hasattr(module, other)]
        if missing:
            self._leave(where, f"its module has no {', '.join(missing)}")
            return
        evidence = self._evidence(where, theirs, known.serve, known.cases, name in SIMPLE)
        if evidence is None:
            return
        self.report.left_alone.pop(where, None)
        entry = self.report.replaced[where] = Replaced(where, f"clone_fast.{known.op}", evidence)
        self._bindings.also_in(module)
        self._bindings.exchange(theirs, replacement(theirs, known.serve, entry))

    def _consider_convolution(self, kind: type) -> None:
        where = f"{kind.__module__}.{CONVOLUTION}"
        forward = vars(kind).get("forward")
        if not issubclass(kind, nn.Module) or forward is None or self._was_considered(forward):
            return
        signature = parameters(forward)
        if signature not in FORWARDS:
            self._leave(where, f"the signature of its forward is unknown: ({signature})")
            return
        with_delta = FORWARDS[signature]
        cases = functools.partial(rosinality.modulated_conv2d_cases, kind, with_delta)
        evidence = self._evidence(where, forward, rosinality.modulated_conv2d, cases, False)
        if evidence is None:
            return
        entry = self.report.replaced[where] = Replaced(where, "clone_fast.modulated_conv2d", evidence)
        ours = replacement(forward, rosinality.modulated_conv2d, entry)
        self._bindings.exchange_method(kind, "forward", forward, ours)

    def _consider_network(self, kind: type) -> None:
        """Record it, if what it computes with is ours: NVIDIA's synthesis, rosinality's generator, discriminators."""
        if not issubclass(kind, nn.Module) or (kind.__name__ == "Generator" and _has_synthesis(kind)):
            return
        forward = vars(kind).get("forward")
        behind = {module.__name__ for module in modules_behind(kind.__mro__, FUNCTIONS)}
        ours = any(where.rpartition(".")[0] in behind for where in self.report.replaced)
        if forward is None or not ours or self._was_considered(forward):
            return
        where = f"{kind.__module__}.{kind.__name__}"
        evidence = "its own code, after calls alike"
        entry = self.report.replaced[where] = Replaced(where, "CUDA graphs of itself", evidence)
        serve = functools.partial(self.recordings.serve, forward)
        self._bindings.exchange_method(kind, "forward", forward, replacement(forward, serve, entry))

    def _was_considered(self, function: object) -> bool:
        before = self._bindings.is_ours(function) or id(function) in self._considered
        self._considered[id(function)] = function
        return before

    def _evidence(
        self,
        where: str,
        theirs: Callable[..., Any],
        ours: Callable[..., Any],
        cases: Callable[[], Iterable[Case]],
        simple: bool,
    ) -> str | None:
        try:
            difference = tried(theirs, ours, cases)
        except Untried as error:
            if simple:
                return f"by its signature and module; it cannot be tried here: {error}"
            self._leave(where, f"it cannot be tried here: {error}")
            return None
        if difference is None:
            return "signature known, the same in a trial"
        self._leave(where, f"it differs from ours: {difference}")
        return None

    def _leave(self, where: str, reason: str) -> None:
        self.report.left_alone[where] = reason

    def _watch_pickles(self, names: dict[str, Any], theirs: Callable[..., Any]) -> None:
        """A pickle of NVIDIA's brings its source; the modules that are made of it are in a dictionary of theirs."""
        sources = names["_src_to_module_dict"]

        def look() -> None:
            for module in list(sources.values()):
                if isinstance(module, ModuleType):
                    self.look(module)

        if not self._bindings.is_ours(theirs):

            @functools.wraps(theirs)
            def reconstruct(*args: Any, **kwargs: Any) -> Any:
                made = theirs(*args, **kwargs)
                if self is _current:
                    look()
                return made

            self._bindings.exchange(theirs, reconstruct)
        look()


def _has_synthesis(kind: type) -> bool:
    """Whether its module has a class for the part that draws; what is before that counts means, and draws."""
    return "SynthesisNetwork" in vars(sys.modules.get(kind.__module__, kind))


def _spellings(serve: Callable[..., Any]) -> tuple[str | None, ...]:
    """The signature, and as older versions have it: the bias compulsory."""
    signature = parameters(serve)
    if serve is rosinality.fused_leaky_relu and signature is not None:
        return signature, signature.replace("bias=None", "bias")
    return (signature,)


_current: Installation | None = None
_lock = threading.RLock()


def install(*, graphs: bool = True) -> Report:
    """Make StyleGAN2 codebases fast that are imported, or will be: their ops, and the builds of these, become ours.

    Served are stylegan2-ada-pytorch, stylegan3's StyleGAN2 networks, rosinality's stylegan2-pytorch, and what carries
    copies of them (PTI, e4e, pSp, ReStyle, HyperStyle, GANInverter, MyStyle, ...):

    - extensions that they would compile are answered, so that importing needs neither nvcc nor ninja nor a GPU;
    - upfirdn2d, bias_act, fused_leaky_relu and conv2d_resample, wherever they are bound;
    - modulated_conv2d, also in networks that come out of a pickle with their source, and ModulatedConv2d.forward;
    - the forward of generators and discriminators: after two calls alike it is recorded as CUDA graphs.

    A function is replaced if its signature and its module are known and if, in a trial on the CPU, it computes what
    ours does. Everything else is left alone. A call that ours is not made for goes to the original. Nothing that is
    pickled mentions clone_fast. A second call returns the same report.

    Args:
        graphs: whether forwards are recorded. What a recording computes with keeps its memory as long as the network
            lives; CLONE_FAST_CAPTURE=0 forbids them from outside.

    Returns:
        What was replaced and what was left alone, and why; `print` it. It grows while modules are imported.
    """
    with _lock:
        installation = _installation(graphs)
        installation.begin()
        return installation.report


def accelerate(network: nn.Module, *, graphs: bool | None = None) -> Report:
    """Make one loaded generator or discriminator of these codebases fast, without `install`.

    Nothing in the object changes: its parameters, their order, its state and its pickles are as they were, and it loads
    where clone_fast is not. What changes is the code that its classes run, in the modules where that is at home, be
    they imported or brought by a pickle; so copies of the network, and others of its classes, become fast too. What is
    replaced and what is not, is decided as by `install`, and undone by `uninstall`.

    Args:
        network: any module, also around or within a network of theirs.
        graphs: as of `install`, for all networks; None leaves it as it is.

    Returns:
        What was replaced of what this network runs and what was left alone, and why.

    Raises:
        TypeError: network is no nn.Module.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"accelerate: network must be a torch.nn.Module, got {type(network).__name__}")
    with _lock:
        return _installation(graphs).accelerate(network)


def _installation(graphs: bool | None) -> Installation:
    """The one of this process, so that nothing is replaced twice."""
    global _current
    _current = _current or Installation()
    if graphs is not None:
        _current.recordings.allowed = graphs
    return _current


def uninstall() -> None:
    """Undo `install` and every `accelerate`: each name is bound to what it was. Without these nothing happens."""
    global _current
    with _lock:
        if _current is not None:
            ended, _current = _current, None
            ended.end()


@contextmanager
def installed(*, graphs: bool = True) -> Iterator[Report]:
    """`install` for the length of a `with` block, and then `uninstall`; inside of `install` it changes nothing."""
    outermost = _current is None or not _current.everywhere
    try:
        yield install(graphs=graphs) if outermost else _installation(None).report
    finally:
        if outermost:
            uninstall()

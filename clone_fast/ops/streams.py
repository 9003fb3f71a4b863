"""Work that goes side by side on the GPU.

The layers of low resolution leave most of a GPU idle. In a CUDA graph what does not depend on one another runs at the
same time, which costs nothing there; launched kernel by kernel, the host is slower than the GPU anyway. So all of this
is for captures, and elsewhere one comes after the other.

A lane is a stream beside the current one. Two things can go wrong, and neither shows before the timing is unlucky: who
reads must wait for who wrote; and memory must not be given to others, nor written in place, before all have read it.
What a stream frees it gives to its own next work, in a capture at once, whoever else still reads it there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import copy_context
from functools import partial
from itertools import cycle
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

First = TypeVar("First")
Second = TypeVar("Second")
Made = TypeVar("Made", Tensor, tuple[Tensor, ...])

# Bytes of an image: what is larger fills a GPU by itself, and its memory is wanted. The largest of one photo, of
# 1024x1024x32 in half precision and of 512x512x64 in float32, are 64 MB, and those of a batch of five 84 and more.
SMALL = 72 << 20

_turns = cycle(range(2))
_turn_of = WeakTensorKeyDictionary()  # which lane what is made of a tensor goes to
_lanes: dict[tuple[torch.device, int, str], torch.cuda.Stream] = {}
_kept: dict[torch.cuda.Stream, list[Tensor]] = {}  # what a lane reads in the capture that is under way


def _lane(device: torch.device, name: str) -> torch.cuda.Stream:
    """A stream beside the current one, the same every time; one lane does not wait for another."""
    key = device, torch.cuda.current_stream(device).cuda_stream, name
    if key not in _lanes:
        _lanes[key] = torch.cuda.Stream(device)
    return _lanes[key]


def _capturing(device: torch.device) -> bool:
    if torch.compiler.is_compiling() or device.type != "cuda":
        return False
    if torch.cuda.is_current_stream_capturing():
        return True
    ended()
    return False


def side_by_side(device: torch.device) -> bool:
    """Whether lanes are beside one another: launches of their own for what could go together pay here alone."""
    return _capturing(device)


def _launched(
    lane: torch.cuda.Stream,
    after: torch.cuda.Event | torch.cuda.Stream,
    reads: Iterable[Tensor],
    run: Callable[[], First],
) -> First:
    """What `run` returns on a lane, which waits for an event, or for all that a stream has, and may read these."""
    if isinstance(after, torch.cuda.Event):
        lane.wait_event(after)
    else:
        lane.wait_stream(after)
    for tensor in reads:
        tensor.record_stream(lane)
    with torch.cuda.stream(lane):
        return run()


def ready(tensors: Iterable[Tensor]) -> None:
    """In a capture, remember with each of them that it is there from now on.

    Who reads it beside the current stream, and parameters with it, need not wait for what is launched there after this.
    """
    tensors = list(tensors)
    if tensors and _capturing(tensors[0].device):
        event = torch.cuda.current_stream(tensors[0].device).record_event()
        for tensor in tensors:
            tensor.ready = event  # type: ignore[attr-defined]


def beside(
    device: torch.device,
    lane: str,
    run: Callable[[], First],
    meanwhile: Callable[[], Second],
    reads: Sequence[Tensor] = (),
) -> tuple[First, Second]:
    """What `run` and `meanwhile` return. In a capture neither waits for the other, and what follows waits for both.

    What they make may be used, and its memory used again, as if it came from the current stream: that waits here, and
    whatever goes beside it later waits for it first. PyTorch runs the gradient of an operation on the stream that the
    operation ran on, so that of `run`'s goes beside the others, too.

    Args:
        device: of all that is launched.
        lane: its name; of one name work goes one after the other.
        run, meanwhile: what goes there, and what stays on the current stream.
        reads: what the gradient of `run` reads of the current stream's. That frees it as soon as the gradient is
            launched, and in a capture would give its memory to others who do not wait.
    """
    if not _capturing(device):
        return run(), meanwhile()
    current, other = torch.cuda.current_stream(device), _lane(device, lane)
    one = _launched(other, current, reads, run)
    two = meanwhile()
    current.wait_stream(other)
    return one, two


def at_home(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """These, of what runs `beside`: `left_beside` may leave their gradients on the lane on which they were made.

    Not those of leaves, which autograd adds up on a stream of its own.
    """
    made = [tensor for tensor in tensors if not tensor.is_leaf]
    if made and _capturing(made[0].device):
        for tensor in made:
            tensor.lane = torch.cuda.current_stream(tensor.device)  # type: ignore[attr-defined]
    return tensors


def made_beside(device: torch.device, lane: str, run: Callable[[], Made], reads: Sequence[Tensor]) -> Made:
    """The tensors that `run` makes, in a capture beside what the current stream did since `reads` were `ready`.

    They are made on the lanes of this name in turn: on the way back one alone would fall behind small layers. What is
    made of the first of `reads` goes to the same one always: what a recomputation makes is read, and given back, by the
    gradient of what was made at first, on that one's lane.

    The current stream waits here. What is made knows its lane, so that `left_beside` may leave its gradient there; its
    memory nothing else gets in this capture, since the lane does not wait for those who read it.
    """
    if not _capturing(device):
        return run()
    if reads[0] not in _turn_of:
        _turn_of[reads[0]] = next(_turns)
    current, other = torch.cuda.current_stream(device), _lane(device, f"{lane} {_turn_of[reads[0]]}")
    events = [tensor.ready for tensor in reads if hasattr(tensor, "ready")]
    # a weight that is no parameter may have been computed since
    known = all(hasattr(tensor, "ready") or isinstance(tensor, torch.nn.Parameter) for tensor in reads)
    after = events[0] if events and known else current
    made = _launched(other, after, reads, run)
    current.wait_stream(other)
    for tensor in (made,) if isinstance(made, Tensor) else made:
        tensor.lane = other  # type: ignore[attr-defined]
        if after is not current:
            tensor.record_stream(current)
    return made


def left_beside(
    device: torch.device,
    lane: str,
    of: Sequence[Tensor],
    run: Callable[[], First],
    meanwhile: Callable[[], Second],
    reads: Sequence[Tensor],
) -> tuple[First, Second]:
    """What `run` and `meanwhile` return, as of `beside`; but where it may, nothing waits for `run`.

    Args:
        of: what `run` makes the gradients of. If all were `made_beside`, or `at_home`, on one lane, these gradients are
            used there alone, by the gradient of what made them.
        reads: all that `run` reads of the current stream's. It is kept to the end of the capture, so it must be
            `SMALL`, or the current stream waits.
    """
    homes = {getattr(tensor, "lane", None) for tensor in of}
    other = homes.pop()
    if other is None or homes or not _capturing(device) or any(tensor.nbytes > SMALL for tensor in reads):
        return beside(device, lane, run, meanwhile)
    ended()
    # Held by us, too: what none but autograd holds it may add to in place, while the lane still reads it.
    _kept.setdefault(other, []).extend(reads)
    return _launched(other, torch.cuda.current_stream(device), reads, run), meanwhile()


def aside(device: torch.device, lane: str, run: Callable[[], First], reads: Sequence[Tensor]) -> First:
    """What `run` makes, in a capture on this lane, for which nothing waits but `joined`.

    reads: all that `run` and its gradient read of the current stream's. Where it is not `SMALL`, that one waits for the
    lane, and goes on itself.
    """
    if not _capturing(device):
        return run()
    if any(tensor.nbytes > SMALL for tensor in reads):
        joined(device, lane)
        return run()
    return _launched(_lane(device, lane), torch.cuda.current_stream(device), reads, run)


@contextmanager
def as_it_comes(
    device: torch.device, lane: str, leaves: Sequence[Tensor], run: Callable[..., None], enough: int
) -> Iterator[None]:
    """`run` of all of these leaves, each once, when the backward within has made their gradients.

    In a capture: of those whose gradients are there, as soon as together they have `enough` elements, on two lanes in
    turn, after what the lane of this name has had; and of the rest at the end, on the current stream, after the same.
    When this ends all is done.

    `run` may write the leaf: whatever reads it on the current stream before its gradient is there is waited for. Where
    a leaf is used several times its gradient is there after the last of them: autograd adds up first.
    """
    if not _capturing(device):
        yield
        run(*leaves)
        return
    current, turns = torch.cuda.current_stream(device), (lane, f"{lane} in turn")
    others = [_lane(device, name) for name in turns]
    before = [others[0].record_event()] if _takes_part(others[0]) else []
    lanes = cycle(others)
    inside = copy_context()  # a backward has a thread of its own on a GPU, where nothing chosen around it reaches
    left = dict.fromkeys(leaves)
    came: dict[Tensor, torch.cuda.Event] = {}

    def serve(leaf: Tensor) -> None:
        came[leaf] = torch.cuda.current_stream(device).record_event()
        if sum(one.numel() for one in came) < enough:
            return
        other = next(lanes)
        for event in (*before, *came.values()):
            other.wait_event(event)
        reads = [one.grad for one in came if one.grad is not None]
        # the gradient to a layer's input reads its weight on the current stream
        _launched(other, current, reads, partial(inside.run, run, *came))
        for one in came:
            del left[one]
        came.clear()

    hooks = [leaf.register_post_accumulate_grad_hook(serve) for leaf in leaves]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    for event in before:
        current.wait_event(event)
    run(*left)
    for name in turns:
        joined(device, name)


def joined(device: torch.device, lane: str) -> None:
    """The current stream waits for what went `aside` on this lane."""
    if _capturing(device):
        other = _lane(device, lane)
        if _takes_part(other):
            torch.cuda.current_stream(device).wait_stream(other)


@contextmanager
def joining(device: torch.device, lane: str) -> Iterator[None]:
    """The current stream waits in the end for what goes `aside` on this lane, however this ends."""
    try:
        yield
    finally:
        joined(device, lane)


def _takes_part(lane: torch.cuda.Stream) -> bool:
    """Whether it is captured."""
    with torch.cuda.stream(lane):
        return torch.cuda.is_current_stream_capturing()


def ended() -> None:
    """Let go of what the lanes read in captures that have come to their end, well or not."""
    for lane in [lane for lane in _kept if not _takes_part(lane)]:
        del _kept[lane]


def rejoin(device: torch.device) -> None:
    """After an error in a capture: the current stream waits for every lane that takes part, or it could not end.

    A capture that ends with lanes of its own under way is an error itself, which would hide the first one and keep
    the memory of the graph.
    """
    current = torch.cuda.current_stream(device)
    for (where, _, _), lane in list(_lanes.items()):
        if where == device and lane != current and _takes_part(lane):
            with suppress(RuntimeError):  # a capture that CUDA has given up already has nothing to wait for
                current.wait_stream(lane)

"""Several photos at once on one GPU: each its own inversion, all live ones side by side.

A captured iteration of one photo is a few hundred small kernels that leave much of a large GPU idle. Here every photo
has its own graphs on a CUDA stream of its own, one thread launches one iteration of each in turn, and the GPU runs
them side by side. As a photo ends it leaves its graphs, of which the capture costs as much as many iterations, to the
next one. What a photo computes is what it would compute alone: no batch, no shared weights, and its own end.
"""

from __future__ import annotations

import gc
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from inspect import GEN_CLOSED, getgeneratorstate, signature
from typing import Any

import torch

from clone_fast.errors import CloneFastError, DivergenceError, MemoryLimitError, PhotoError, SettingsError
from clone_fast.inversion import Inversion
from clone_fast.invert import Opened, StrPath, invert, open_network, override, read_real_images
from clone_fast.memory import full, photos_that_fit, without_frames
from clone_fast.nn import Generator, Network, frozen, settled
from clone_fast.stepwise import Pause, Steps
from clone_fast.tweak import TweakSettings

# Photos at once without a number of the user's: eight of config F at 1024x1024 are no faster than three or four, whose
# graphs are captured in half the time.
MOST = 4
AHEAD = 8  # iterations that a photo launches in its turn: the GPU has them while the host is busy with another photo

Result = Inversion | CloneFastError


def invert_each(
    photos: Iterable[Any],
    network: StrPath | Network | Generator | Opened | None = None,
    *,
    at_once: int | None = None,
    **options: Any,
) -> Iterator[tuple[int, Result]]:
    """Invert photo after photo, several side by side, and give each result as it is ready.

    The results are those of `invert`, photo by photo: same options, same seed. As one photo ends the next one begins,
    so that `at_once` of them are under way until none is left. The network is opened once.

    Args:
        photos: what `invert` takes, as many as there are; read one by one as there is room.
        network: as of `invert`.
        at_once: photos under way at a time; by default as many as should fit into the free memory of the GPU, 4 at
            most, and 1 on a CPU, which gains nothing by it.
        options: of `invert`, the same for all photos. `seconds` of a result include the time that the others took
            meanwhile, and `progress` hears of all photos.

    Yields:
        (index, result) in the order in which photos end: an `Inversion`, or the PhotoError, DivergenceError or
        MemoryLimitError of a photo that cannot be inverted, after which the others go on.

        A photo that does not fit into the memory beside the others is begun again when one of them has ended, with
        fewer at once from then on and a RuntimeWarning; only alone does it fail. After Ctrl-C no photo is begun, and
        those under way end with their best so far; KeyboardInterrupt itself comes at the end if no result tells of it.

    Raises:
        SettingsError, CheckpointError, BackendError: what concerns all photos, most of it at the call.
    """
    signature(invert).bind(None, **options)  # an option that `invert` does not have is told now
    if at_once is not None and at_once < 1:
        raise SettingsError(f"at_once must be >= 1, got {at_once}")
    asked = {field.name: options.get(field.name) for field in fields(TweakSettings)}
    settings = override(options.get("tweak_settings") or TweakSettings(), **asked)
    opened = open_network(network, options.pop("discriminator", None), device=options.get("device"))
    settings = settled(settings, opened.device)
    options["real_images"] = read_real_images(options.get("real_images"), opened.network.generator)
    if at_once is None:
        at_once = min(photos_that_fit(opened.network, settings, opened.device), MOST)
    return _Window(photos, opened, at_once, settings, options).results()


def invert_many(
    photos: Iterable[Any],
    network: StrPath | Network | Generator | Opened | None = None,
    *,
    at_once: int | None = None,
    **options: Any,
) -> list[Inversion]:
    """Invert photos, several side by side: what `invert_each` gives, all at the end and in the order of the photos.

    Every result holds networks of its own. Of more photos than memory can hold the networks of, take `invert_each`
    and save each result.

    Args:
        photos, network, at_once, options: as of `invert_each`.

    Returns:
        An `Inversion` for every photo. After Ctrl-C those of the photos that were begun, which are the first ones.

    Raises:
        CloneFastError: the error of the first photo that failed, raised when all others have ended; their results are
            lost, so take `invert_each` where a photo may fail. Or what concerns all photos, at once.
    """
    results = dict(invert_each(photos, network, at_once=at_once, **options))
    done = [results[index] for index in sorted(results)]
    for result in done:
        if isinstance(result, CloneFastError):
            raise result
    return [result for result in done if isinstance(result, Inversion)]


class _Place:
    """Room for one photo at a time: a CUDA stream, and the work and graphs that one photo leaves to the next."""

    def __init__(self, opened: Opened, device: torch.device) -> None:
        self.opened = replace(opened, searches=[], tweaks=[])
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def active(self) -> AbstractContextManager[Any]:
        """Inside the `with` block work is launched on this stream."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def follow(self) -> None:
        """What is launched here from now on waits for what the caller has launched on its stream."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))

    def lead(self) -> None:
        """What the caller launches from now on waits for what was launched here."""
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)


class _Job:
    """The inversion of one photo, at a place."""

    def __init__(self, index: int, photo: Any, place: _Place, steps: Steps[Inversion]) -> None:
        self.index, self.photo, self.place, self.steps = index, photo, place, steps
        self.pause: Pause | None = None

    def advance(self, interrupt: KeyboardInterrupt | None = None) -> Pause | Result:
        """One step, or the end with an interrupt: a pause, the result, or an error that the photo itself can cause.

        Raises:
            torch.OutOfMemoryError: in what no stage watches over, say the measuring.
            Exception: whatever else; none of it is the photo's.
        """
        with self.place.active():
            try:
                self.pause = next(self.steps) if interrupt is None else self.steps.throw(interrupt)
                return self.pause
            except StopIteration as end:
                result: Inversion = end.value
                return result
            except (PhotoError, DivergenceError, MemoryLimitError) as error:
                return without_frames(error)

    def close(self) -> None:
        """Give it up, when what it has launched is done with its memory."""
        if self.place.stream is not None:
            self.place.stream.synchronize()
        self.steps.close()


class _Window:
    """The photos that are under way, and those that wait."""

    def __init__(
        self,
        photos: Iterable[Any],
        opened: Opened,
        at_once: int,
        settings: TweakSettings,
        options: dict[str, Any],
    ) -> None:
        self.opened, self.at_once, self.settings, self.options = opened, at_once, settings, options
        self.device = opened.device
        self.waiting = enumerate(photos)
        self.again: deque[tuple[int, Any]] = deque()  # put back for want of memory
        self.live: list[_Job] = []
        self.free: list[_Place] = []
        self.ended: deque[tuple[int, Result]] = deque()
        self.stopping = False  # after Ctrl-C
        self.told = False  # whether a result says so

    def results(self) -> Iterator[tuple[int, Result]]:
        """What `invert_each` gives."""
        busy = True
        with frozen(self.opened.network.generator):  # once for all: no search thaws it while others go on
            try:
                while busy:
                    try:
                        busy = self._round()
                    except KeyboardInterrupt:
                        self._stop()
                    while self.ended:
                        yield self.ended.popleft()
                        self._follow()
            finally:
                for job in self.live:
                    job.close()
        if self.stopping and not self.told:
            raise KeyboardInterrupt

    def _round(self) -> bool:
        """Begin photos while there is room, then advance each by a few steps. False: there is nothing left to do."""
        while len(self.live) < self.at_once and self._begin():
            pass
        for job in tuple(self.live):
            if job in self.live:  # not ended meanwhile, with all others, by an interrupt
                self._advance(job)
        return bool(self.live or self.ended)

    def _begin(self) -> bool:
        """Put the next photo under way, if there is one."""
        following = None if self.stopping else self.again.popleft() if self.again else next(self.waiting, None)
        if following is None:
            return False
        index, photo = following
        place = self.free.pop() if self.free else _Place(self.opened, self.device)
        self.live.append(_Job(index, photo, place, invert.steps(photo, place.opened, **self.options)))
        self._follow()
        return True

    def _follow(self) -> None:
        """Who called has had control: what is launched from now on comes after what was launched there.

        So a photo is read after it was written, and the memory of a result that was given away is not written again
        before it was read.
        """
        for place in (*self.free, *(job.place for job in self.live)):
            place.follow()

    def _advance(self, job: _Job, interrupt: KeyboardInterrupt | None = None) -> None:
        """A few steps of a photo, up to where it would wait for the GPU, and what follows if it ends."""
        try:
            got = job.advance(interrupt)
            for _ in range(1, AHEAD):
                if got is not Pause.STEP:
                    break
                got = job.advance()
        except torch.OutOfMemoryError:
            got = MemoryLimitError(full("invert", self.opened.network.arch, self.device, self.settings))
        if (got is Pause.FULL or isinstance(got, MemoryLimitError)) and len(self.live) > 1 and not self.stopping:
            self._put_back(job)
        elif not isinstance(got, Pause):
            self.live.remove(job)
            self.free.append(job.place)
            job.place.lead()
            self.ended.append((job.index, got))
            if isinstance(got, Inversion) and got.settings["interrupted"]:
                self.told = True
                if not self.stopping:  # Ctrl-C came within this one, and is meant for all
                    self._stop()

    def _put_back(self, job: _Job) -> None:
        """Give a photo up that does not fit in beside the others, to be begun again when one of them has ended."""
        job.close()
        self.live.remove(job)
        self.free.clear()
        self.again.append((job.index, job.photo))
        self.at_once = len(self.live)
        gc.collect()  # what was given up refers to itself
        message = f"photo {job.index} does not fit into the memory of {self.device} beside {len(self.live)} more"
        warnings.warn(f"{message}: it waits, and at_once is {self.at_once} from now on", RuntimeWarning, stacklevel=5)

    def _stop(self) -> None:
        """Ctrl-C: end what iterates with its best so far; what is being measured goes on to its end."""
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = True
        for job in tuple(self.live):
            if job.pause is None or getgeneratorstate(job.steps) == GEN_CLOSED:
                self.live.remove(job)  # it has nothing to give: interrupted while it was loaded or measured
            elif job.pause in (Pause.STEP, Pause.READ):
                self._advance(job, KeyboardInterrupt())

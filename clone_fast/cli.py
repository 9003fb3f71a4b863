"""The command line: invert, invert-folder, edit, export, info, convert, demo, run.

What a user can get wrong is one line on stderr and exit code 2, before anything is written; an unexpected
exception keeps its traceback. Ctrl-C during an inversion keeps the best so far, writes everything and exits
with 130.
"""

from __future__ import annotations

import atexit
import gc
import os
import platform
import re
import sys
import tempfile
import warnings
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import click
import torch
from torch import Tensor

from clone_fast.checkpoints import load_network, save_network, save_rosinality
from clone_fast.compat.script import run_script
from clone_fast.edit import SUFFIXES, load_directions, pca_directions, resolve_direction, standardise
from clone_fast.errors import CloneFastError, OutputError
from clone_fast.inversion import FORMATS, Inversion
from clone_fast.invert import invert as run_inversion
from clone_fast.ops.dispatch import backends
from clone_fast.options import RUN, finite, options
from clone_fast.photo import open_photo, save_png

if TYPE_CHECKING:
    from clone_fast.folder import Tally

BASE = "Network that FOLDER was made from, if it was saved with --networks delta; default: where it was then."
STAGES = {"latent": "latent search", "tweak": "tweak"}
CAPTURED = 20  # of a tweak's steps: by then its iterations are graphs, and the host has little to do


class Failure(click.ClickException):
    """A mistake of the user: `Error: <one line>`, exit code 2."""

    exit_code = 2


class _Script(Exception):
    """A script to run, handed out of click: what that makes of Ctrl-C or EOFError is not what Python does."""

    def __init__(self, target: str, args: tuple[str, ...], **options: bool) -> None:
        self.target, self.args_of_script, self.options = target, args, options


class _Group(click.Group):
    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs)
        except _Script as handed_out:
            script = handed_out
        run_script(script.target, script.args_of_script, **script.options)
        return None

    def invoke(self, ctx: click.Context) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                return super().invoke(ctx)
            except CloneFastError as error:
                raise Failure(" ".join(str(error).split())) from error
            except click.UsageError as error:
                error.ctx = None  # the message alone, without lines of usage above it
                raise
            except KeyboardInterrupt:
                click.echo("Interrupted.", err=True)
                raise click.exceptions.Exit(130) from None


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    click.echo(f"Warning: {message}", err=True)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


# ------------------------------------------------------------------------------------------------------------
# commands


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(_version("clone_fast"), prog_name="clone-fast")
def main() -> None:
    """Photo in, clone out: near perfect GAN inversion, fast."""


@main.command()
@click.argument("photo", type=click.Path(path_type=Path))
@options("network", "discriminator", "out", "label", "real-images", "resize", "crop", "networks", *RUN)
def invert(photo: Path, out: Path, **options: Any) -> None:
    """Clone PHOTO.

    Writes the clone, a report, the numbers and the tweaked network to a folder.
    """
    _check_folder(out)
    open_photo(photo)  # a photo that cannot be read shall not wait for the network to load
    _clone(photo, out, **options)


@main.command("invert-folder")
@click.argument("photos", type=click.Path(path_type=Path))
@options("network", "discriminator", "out", "label", "real-images", "resize", "networks", *RUN)
@click.option("--at-once", metavar="K", type=click.IntRange(min=1),
              help="Photos that a process inverts at a time; default: as it sees fit.")  # fmt: skip
def invert_folder(photos: Path, out: Path, quiet: bool, **options: Any) -> None:
    """Clone every photo of the folder PHOTOS and its subfolders.

    On N GPUs: torchrun --nproc-per-node=N -m clone_fast invert-folder PHOTOS --out DIR. Each process takes a GPU of its
    own, and the next photo when it is ready for one.

    The result of PHOTOS/a.jpg is the folder DIR/a.jpg, with all that invert writes: named with the suffix, so that
    a.jpg and a.png both have one. It appears there whole, or not at all. A photo that has a result is left out,
    whatever options that was made with: a run that was killed is finished by the same command. A photo that fails is
    told, and tried again by the next run; the exit code is then 1.
    """
    from clone_fast.folder import invert_folder as run

    _check_folder(out)
    tally = run(photos, out, quiet=quiet, **options)
    if tally is None:
        return  # the first process tells
    if not quiet:
        for line in _tally(tally, out):
            click.echo(line)
    if tally.failures or tally.ended:
        raise click.exceptions.Exit(1)


@main.command()
@click.option("--photo", "name", default="astronaut", show_default=True, help="A photo of scikit-image.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("out/demo"), show_default=True, help="Folder.")
@options("networks", *RUN)
def demo(name: str, out: Path, **options: Any) -> None:
    """Clone a real photo of scikit-image.

    Uses the shipped demo network. The names of the photos are told where one is unknown.
    """
    from clone_fast.demo.photos import photo

    _check_folder(out)
    _clone(photo(name), out, **options)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--direction", help="Name of a direction, or FILE or FILE:NAME with directions.")
@click.option("--strength", type=float, callback=finite, help="How far, in standard deviations of w.")
@click.option("--out", type=click.Path(path_type=Path), help="PNG to write; default: in FOLDER.")
@click.option("--list", "list_names", is_flag=True, help="List the directions by name.")
@click.option("--network", type=click.Path(path_type=Path), help=BASE)
def edit(
    folder: Path,
    direction: str | None,
    strength: float | None,
    out: Path | None,
    list_names: bool,
    network: Path | None,
) -> None:
    """Edit a saved clone.

    Moves the latent of FOLDER, as written by invert, along a direction.
    """
    if not list_names and (direction is None or strength is None):
        raise click.UsageError("edit wants --direction and --strength, or --list")
    if out is not None:
        _check_folder(out.parent)
    inversion = Inversion.load(folder, network)
    known = {**pca_directions(inversion.generator), **inversion.directions}
    if list_names or direction is None or strength is None:
        for name in sorted(known, key=_natural):
            click.echo(name)
        return
    name, vector = _find_direction(direction, known, inversion)
    target = out or folder / f"edit_{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}_{strength:+g}.png"
    save_png(target, inversion.edit(vector, strength))
    click.echo(target)


@main.command()
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.argument("target", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Write .pt even in sizes that rosinality's own classes do not have.")
def convert(source: Path, target: Path, force: bool) -> None:
    """Convert a network file.

    OUT decides the format: .safetensors (clone_fast) or .pt (rosinality).
    """
    suffix = target.suffix.lower()
    if suffix == ".pkl":
        raise Failure(f"{target}: pickles of NVIDIA's classes are read, not written; give .safetensors or .pt")
    if suffix not in (".safetensors", ".pt"):
        raise Failure(f"{target}: OUT must end in .safetensors (clone_fast) or .pt (rosinality)")
    _check_folder(target.parent)
    network = load_network(source)
    if suffix == ".safetensors":
        save_network(network, target)
    else:
        save_rosinality(network, target, strict=not force)
    click.echo(target)


@main.command(context_settings={"allow_interspersed_args": False})
@click.option("-m", "module", is_flag=True, help="SCRIPT is the name of a module, as for python -m.")
@click.option("--report", is_flag=True, help="Say at the end, on stderr, what was replaced and what was left alone.")
@click.argument("script")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def run(script: str, args: tuple[str, ...], **options: bool) -> None:
    """Run another codebase's SCRIPT on our ops.

    As `python SCRIPT ARGS...` does, with clone_fast.install() before: PTI, stylegan2-ada-pytorch, stylegan3,
    rosinality's StyleGAN2 and what grew from them need no change, and compile nothing.
    """
    if not options["module"] and not Path(script).exists():
        raise Failure(f"{script}: no such script")
    raise _Script(script, args, **options)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--to", type=click.Choice(FORMATS), required=True,
              help="rosinality: .pt; nvidia: .pkl with G, D and G_ema; pti: .pt of the generator as a module.")
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="FILE", help="File to write.")
@click.option("--base", type=click.Path(path_type=Path),
              help="NVIDIA's .pkl of the network, whose classes nvidia and pti take.")
@click.option("--network", type=click.Path(path_type=Path), help=BASE)
@click.option("--force", is_flag=True, help="Write rosinality's .pt even in sizes that its own classes do not have.")
def export(folder: Path, to: str, out: Path, base: Path | None, network: Path | None, force: bool) -> None:
    """Write the network of a saved clone for other tools.

    Takes FOLDER, as written by invert. Beside FILE stands FILE_w.npz or FILE_w.pt with the latent. What the tools draw
    for it with constant noise is the clone.
    """
    _check_folder(out.parent)
    beside = Inversion.load(folder, network).export(out, to, base=base, strict=not force)
    click.echo(out)
    click.echo(beside)


@main.command()
def info() -> None:
    """Versions, devices, backends.

    For each op and backend: whether it runs here, or why not.
    """
    rows = [(name, _version(name)) for name in ("clone_fast", "torch", "triton")]
    rows += [("python", platform.python_version()), ("CUDA", torch.version.cuda or "none in this torch")]
    rows += [("cpu", f"{platform.machine()}, {torch.get_num_threads()} threads")]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = f"{device.total_memory / 2**30:.1f} GiB"
        rows.append((f"cuda:{index}", f"{device.name}, {memory}, sm_{device.major}{device.minor}"))
    for name, text in rows:
        click.echo(f"{name:<12}{text}")
    shown = ""
    for op, backend, reason in backends():
        if op != shown:
            click.echo(f"\n{op}")
        shown = op
        click.echo(f"  {backend:<10}{'available' if reason is None else f'not available: {reason}'}")


# ------------------------------------------------------------------------------------------------------------
# the work of invert and demo


def _clone(photo: Any, out: Path, quiet: bool, networks: str, **options: Any) -> None:
    atexit.register(gc.freeze)  # nobody waits for the end of Python to look for cycles among all that was imported
    progress = Progress(quiet)
    try:
        inversion = run_inversion(photo, progress=progress, **options)
    finally:
        progress.close()
    from clone_fast.report import save_result

    save_result(inversion, out, networks=networks)
    if not quiet:
        for line in _summary(inversion, out):
            click.echo(line)
    if inversion.settings.get("interrupted"):
        click.echo("Interrupted: what is written is the best so far.", err=True)
        raise click.exceptions.Exit(130)


def _summary(inversion: Inversion, out: Path) -> list[str]:
    from clone_fast.report import describe_drift

    values = inversion.metrics
    lines = [f"PSNR      {values['latent_psnr']:.2f} dB latent only -> {values['psnr']:.2f} dB clone"]
    lines += [f"time      {sum(inversion.seconds.values()):.1f} s"]
    lines += [f"cohesion  {phrase}" for phrase in describe_drift(values)]
    if values.get("editability") is not None:
        lines += [f"edits     correlate {values['editability']:.2f} with those of latent only"]
    return [*lines, f"written   {out}{os.sep}  report.png shows it at one look"]


def _tally(tally: Tally, out: Path) -> list[str]:
    lines = [f"done      {tally.done} in {tally.seconds:.1f} s, {tally.per_hour:.0f} an hour"]
    lines += [f"skipped   {tally.skipped} done before"] if tally.skipped else []
    lines += [f"failed    {name}: {reason}" for name, reason in tally.failures]
    lines += [f"ended     process {rank}, before its work was done" for rank in tally.ended]
    return [*lines, f"written   {out}{os.sep}"]


class Progress:
    """The `progress` argument of invert as bars of tqdm on stderr, one for each stage."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._stage = ""
        self._imports = False
        self._bar: Any = None

    def __call__(self, stage: str, step: int, total: int, loss: float, psnr: float) -> None:
        if stage != self._stage or self._bar is None:
            from tqdm import tqdm

            self.close()
            self._stage = stage
            # Not on a terminal a bar is a line of a log: rarely, then.
            interval = 0.1 if sys.stderr.isatty() else 10.0
            self._bar = tqdm(
                total=total, desc=f"{STAGES.get(stage, stage):<13}", unit="step", mininterval=interval,
                file=sys.stderr, disable=self._quiet, dynamic_ncols=True,
            )  # fmt: skip
        if stage == "tweak" and step >= CAPTURED and not self._imports:
            self._imports = True  # the host waits for the GPU by now, and the report's matplotlib takes long to import
            Thread(target=import_module, args=("clone_fast.report",)).start()
        self._bar.set_postfix_str(f"{psnr:.2f} dB, loss {loss:.4g}", refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Finish the bar that is shown, if there is one."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


# ------------------------------------------------------------------------------------------------------------
# checks and names


def _check_folder(folder: Path) -> None:
    """Fail now if `folder` cannot be made or written to, without leaving a trace."""
    existing = folder.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise OutputError(f"{folder}: cannot be a folder, since {existing} is a file")
    try:
        with tempfile.TemporaryFile(dir=existing):  # asks the file system: permission bits do not tell it all
            pass
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written to ({error.strerror})") from error


def _find_direction(text: str, known: dict[str, Tensor], inversion: Inversion) -> tuple[str, Tensor]:
    """A name among `known`, or FILE or FILE:NAME, whose directions are brought to one standard deviation."""
    file, separator, name = text, "", ""
    if Path(file).suffix.lower() not in SUFFIXES and ":" in text:
        file, separator, name = text.rpartition(":")
    if text in known or Path(file).suffix.lower() not in SUFFIXES:
        return text, resolve_direction(text, known)
    found = load_directions(file)
    if not separator:
        if len(found) > 1:
            names = ", ".join(sorted(found, key=_natural))
            raise Failure(f"{file}: holds several directions; choose one as {file}:NAME, of {names}")
        name = next(iter(found))
    vector = resolve_direction(name, found)
    return name, standardise({name: vector}, inversion.generator)[name]


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key: pca2 before pca10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]

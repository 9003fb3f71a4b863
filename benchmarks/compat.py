"""One codebase with us and without us, in a process of its own: what bench_compat.py starts.

    python -m benchmarks.compat build ada build.json      # its extensions, once
    python -m benchmarks.compat rows ada rows.jsonl       # a row a line, as soon as it is known

What is measured is theirs: their loops, or the step that they take written out, in their arithmetic, unmodified. First
they run without us, then with us, from the same weights with the same draws, in one process; a row says by how much the
losses differ, and what is allowed.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
from torch import Tensor

import clone_fast
from benchmarks import common, foreign, scripts, steps, targets
from benchmarks.contenders import arithmetic
from benchmarks.foreign import Drawn, Run, looped, with_us
from clone_fast.progress import quick_psnr

Row = dict[str, Any]

TUNED = 350 if common.ON_GPU else 6  # steps of PTI's tuning
WARM = 3  # steps before a loop is timed
GENERATOR_PICKLE = "generator.pkl"


def compared(theirs: Run, ours: Run, allowed: float) -> Row:
    """The times of both, and whether they did the same."""
    found: Row = theirs.told("theirs") | ours.told("ours") | {"steps": len(ours.losses)}
    found |= {"speedup": found["theirs_ms"] / found["ours_ms"]}
    return found | {"worst": ours.apart(theirs), "allowed": allowed}


def tuning(world: Drawn, nvidia: bool) -> Iterator[Row]:
    """The generator's part of PTI's step."""
    options = {"force_fp32": True} if nvidia else {}
    for precision in ("fp32", "tf32"):
        with arithmetic(precision, by_trial=False):
            theirs = looped(world.tuning(**options))
            for how in ("install", "accelerate"):
                with with_us(how, world.generator) as told:
                    ours = looped(world.tuning(**options))
                row = {"row": "tuning step", "arithmetic": precision, "how": how}
                yield row | compared(theirs, ours, steps.NEAR[precision]) | told()


def half(world: Drawn, nvidia: bool) -> Iterator[Row]:
    """Forward and backward to all weights in their own fp16 mode; compared are the image and all gradients."""
    if not nvidia:
        return
    generator = world.generator.requires_grad_(True)
    weight = torch.randn_like(world.photo) / world.photo[0].numel() ** 0.5

    def step() -> Tensor:
        generator.zero_grad()
        loss = (world.draw(generator, force_fp32=False).float() * weight).sum()
        loss.backward()
        return loss

    def image() -> Tensor:
        with torch.no_grad():
            return world.draw(generator, force_fp32=False).float()

    def gradients() -> Tensor:
        return torch.cat([p.grad.flatten() for p in generator.parameters() if p.grad is not None]).double()

    with arithmetic("tf32", by_trial=False):  # of the layers that are not fp16, as PyTorch has it by default
        theirs, expected, wanted = looped(step), image(), gradients()
        with with_us("install") as told:
            ours = looped(step)
            apart = float((image() - expected).abs().max() / expected.abs().max())
        found = compared(theirs, ours, steps.NEAR["fp16"]) | {"worst": apart} | told()
        found["cosine"] = float(torch.cosine_similarity(gradients(), wanted, dim=0))
    generator.requires_grad_(False)
    yield {"row": "forward + backward", "arithmetic": "fp16", "how": "install", **found}


def projector(world: Drawn, nvidia: bool) -> Iterator[Row]:
    """rosinality's projector.py as a script: without us by Python, with us by `clone_fast run`."""
    absent = targets.lacking(("torchvision",))
    if nvidia or absent:
        if absent:
            yield {"row": "projector step", "failed": absent}
        return
    with TemporaryDirectory() as folder:
        script = scripts.Projector(Path(folder), targets.TARGETS["rosinality"].folder, world)
        for precision in ("fp32", "tf32"):
            with arithmetic(precision, by_trial=False):
                theirs = script.run()
                with with_us("install") as told:
                    ours = script.run(by_us=True)
            row = {"row": "projector step", "arithmetic": precision, "how": "run"}
            yield row | compared(theirs, ours, steps.NEAR[precision]) | told()


def tuned(world: Drawn, nvidia: bool) -> Iterator[Row]:
    """All steps of PTI's tuning, eager, theirs, against one call of `tune` on the same modules."""
    start = {name: value.clone() for name, value in world.generator.state_dict().items()}

    def timed(run: Callable[[], Any]) -> tuple[Any, float]:
        world.generator.load_state_dict(start)
        foreign.synchronize()
        began = time.perf_counter()
        result = run()
        foreign.synchronize()
        return result, time.perf_counter() - began

    def eager(count: int) -> float:
        adam = torch.optim.Adam(world.generator.requires_grad_(True).parameters(), lr=foreign.RATE)
        for _ in range(count):
            image = world.draw(world.generator, force_fp32=True)
            loss = torch.nn.functional.mse_loss(image, world.photo)
            adam.zero_grad()
            loss.backward()
            adam.step()
        return float(quick_psnr(image.detach(), world.photo))

    about: Row = {"row": "tune", "how": "tune", "steps": TUNED}
    for precision, suffix in (("fp32", ""), ("tf32", "_tf32")):
        with arithmetic(precision, by_trial=False):
            timed(lambda: eager(WARM))
            psnr, seconds = timed(lambda: eager(TUNED))
        about |= {f"theirs{suffix}_s": seconds, f"theirs{suffix}_psnr": psnr}
    for precision in ("bf16", "tf32", "fp32") if common.ON_GPU else ("fp32",):

        def ours(count: int, precision: str = precision) -> Any:
            return clone_fast.tune(
                world.generator, None, world.photo, world.ws, steps=count, mode="recon", precision=precision
            )

        _, first = timed(lambda: ours(WARM))
        done, seconds = timed(lambda: ours(TUNED))
        row = about | {"arithmetic": precision, "first_s": first, "ours_s": seconds, "ours_psnr": done.psnr}
        theirs = about["theirs_tf32_s" if precision == "tf32" else "theirs_s"]
        yield row | {"stopped": done.stopped, "ours_steps": done.steps, "speedup": theirs / seconds}


def coach() -> Iterator[Row]:
    """PTI's SingleIDCoach on one photo, then with a perceptual loss that is free, which leaves the generator's part."""
    with TemporaryDirectory() as folder:
        made = subprocess.run(
            [sys.executable, "-m", "benchmarks.compat", "pickle", "ada", str(Path(folder) / GENERATOR_PICKLE)],
            capture_output=True,
            text=True,
        )
        if made.returncode:
            raise RuntimeError(f"stylegan2-ada-pytorch made no pickle: {made.stderr[-500:]}")
        torch.manual_seed(0)
        for precision in ("fp32", "tf32"):
            for aside in (False, True):
                with arithmetic(precision, by_trial=False):
                    theirs = scripts.coached(Path(folder), aside)
                    with with_us("install") as told:
                        ours = scripts.coached(Path(folder), aside)
                row = {"row": "coach step" + ", LPIPS aside" * aside, "arithmetic": precision, "how": "install"}
                yield row | compared(theirs, ours, steps.NEAR[precision]) | told()


MEASURED: dict[str, tuple[str, tuple[Callable[..., Iterator[Row]], ...]]] = {
    "ada": ("ada", (tuning, half)),
    "sg3": ("sg3", (tuning, half)),
    "rosinality": ("rosinality", (tuning, projector)),
    "PTI": ("PTI", (coach,)),
    "tune": ("ada", (tuned,)),
}
"""What a process measures: the codebase, and the loops."""


def rows(name: str, buildable: bool) -> Iterator[Row]:
    """All rows of one process; one that fails is a row that says why."""
    target, measures = MEASURED[name]
    about: Row = {"target": target, "network": foreign.NETWORK}
    try:
        networks, about["ops"] = targets.enter(target, buildable)
        nvidia = targets.TARGETS[target].nvidia
        given: tuple[Any, ...] = () if target == "PTI" else (foreign.drawn(networks, nvidia), nvidia)
    except Exception as error:
        yield {"row": "import", "failed": _said(error), **about}
        return
    for measure in measures:
        try:
            for row in measure(*given):
                yield about | row
        except Exception as error:
            yield {"row": measure.__name__, "failed": _said(error), **about}


def _said(error: Exception) -> str:
    traceback.print_exception(error, file=sys.stderr)
    return f"{type(error).__name__}: {error}"[:500]


@click.command()
@click.argument("job", type=click.Choice(["build", "rows", "pickle"]))
@click.argument("name", type=click.Choice(list(MEASURED)))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--unbuilt", is_flag=True, help="Its extensions cannot be built: do not try.")
def main(job: str, name: str, out: Path, unbuilt: bool) -> None:
    """Do JOB for NAME, and leave what it found in OUT."""
    if job == "rows":
        for row in rows(name, not unbuilt):
            with out.open("a") as file:
                file.write(json.dumps(row) + "\n")
        return
    began = time.perf_counter()
    networks, ops = targets.enter(MEASURED[name][0])
    if job == "build":
        out.write_text(json.dumps({"build_s": time.perf_counter() - began, "ops": ops}))
        return
    torch.manual_seed(0)
    generator = foreign.nvidia_generator(networks).cpu()
    with open(out, "wb") as stream:
        pickle.dump({"G_ema": generator}, stream)


if __name__ == "__main__":
    main()

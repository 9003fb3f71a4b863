"""Scripts and trainers of other codebases, run as they are and watched from outside: where they call a loss."""

from __future__ import annotations

import importlib
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common, foreign, targets
from benchmarks.foreign import Drawn, Run
from clone_fast.compat.script import run_script
from clone_fast.photo import save_png


class Enough(Exception):
    """Raised into a script that has taken the steps that were asked for."""


class Clock:
    """Tells a run when a step begins; the time of a step is from one beginning to the next."""

    def __init__(self, run: Run) -> None:
        self.run, self.began = run, 0.0

    def tick(self) -> None:
        foreign.synchronize()
        now = time.perf_counter()
        if self.began:
            self.run.ms.append((now - self.began) * 1e3)
        self.began = now


class Projector:
    """rosinality's projector.py; in the place of its perceptual loss, which would download VGG, the mean square."""

    def __init__(self, folder: Path, checkout: Path, world: Drawn) -> None:
        self.script, self.folder = checkout / "projector.py", folder
        if not common.ON_GPU:  # it knows no other device than "cuda"
            source = self.script.read_text().replace('device = "cuda"', 'device = "cpu"')
            self.script = folder / "projector.py"
            self.script.write_text(source)
        torch.save({"g_ema": world.generator.state_dict()}, folder / "weights.pt")
        save_png(folder / "photo.png", world.photo)

    def run(self, by_us: bool = False) -> Run:
        """Its first steps, by Python or by us."""
        options = {"--ckpt": self.folder / "weights.pt", "--size": foreign.SIZE, "--step": 100}
        arguments = [str(part) for pair in options.items() for part in pair] + [str(self.folder / "photo.png")]
        torch.manual_seed(0)
        with foreign.watched() as run, targets.scripting(str(self.script), *arguments):
            clock = Clock(run)

            def percept(image: Tensor, photo: Tensor) -> Tensor:
                if len(run.losses) == foreign.STEPS:
                    raise Enough
                clock.tick()
                loss = (image - photo).square().mean([1, 2, 3])
                run.losses.append(loss.detach())
                return loss

            vars(sys.modules["lpips"])["PerceptualLoss"] = lambda **_: percept
            try:
                if by_us:
                    run_script(str(self.script), arguments)
                else:
                    runpy.run_path(str(self.script), run_name="__main__")
            except Enough:
                return run
        raise RuntimeError(f"projector.py ended after {len(run.losses)} steps")


class Free(nn.Module):
    """A perceptual loss that costs nothing and is above PTI's threshold, which is set to 0."""

    def forward(self, image: Tensor, photo: Tensor) -> Tensor:
        return image.new_full((1,), 1e-6)


def coached(folder: Path, aside: bool) -> Run:
    """PTI's SingleIDCoach.train() on one photo, by its own settings but for the files, the device and the steps.

    Args:
        folder: with the generator's pickle; the pivot is put where PTI looks for it.
        aside: leave its LPIPS out.
    """
    paths, hyper, settings = (
        importlib.import_module(f"configs.{name}") for name in ("paths_config", "hyperparameters", "global_config")
    )
    single: Any = importlib.import_module("training.coaches.single_id_coach")
    vars(settings).update(device=str(common.DEVICE), run_name="run", training_step=1)
    vars(hyper).update(use_last_w_pivots=True, max_pti_steps=foreign.STEPS + 1, LPIPS_value_threshold=0)
    vars(paths).update(
        stylegan2_ada_ffhq=str(folder / "generator.pkl"),
        checkpoints_dir=str(folder / "checkpoints"),
        embedding_base_dir=str(folder / "embeddings"),
    )
    torch.manual_seed(0)
    pivot = folder / "embeddings" / paths.input_data_id / paths.pti_results_keyword / "photo" / "0.pt"
    pivot.parent.mkdir(parents=True, exist_ok=True)
    torch.save(torch.randn(1, 2 * (foreign.SIZE.bit_length() - 1) - 2, foreign.W_DIM), pivot)

    with foreign.watched() as run:
        clock = Clock(run)

        class Watched(single.SingleIDCoach):
            def forward(self, w: Tensor) -> Tensor:
                clock.tick()
                return super().forward(w)

            def calc_loss(self, *args: Any) -> Any:
                losses = super().calc_loss(*args)
                run.losses.append(losses[0].detach())
                return losses

        coach = Watched([(("photo",), foreign.photo().cpu())], False)
        if aside:
            coach.lpips_loss = Free()
        coach.train()
    return run

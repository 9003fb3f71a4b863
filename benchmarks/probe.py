"""One contender of one row, without the gate and the others: its times, its memory, and where the time goes.

python -m benchmarks.probe tweak-bf16-1-F-1024             # the baseline
CLONE_FAST_BENCH_RGB=conv python -m benchmarks.probe clone-bf16-5-F-1024
python -m benchmarks.probe tweak-tf32-1-F-1024 --contender ours
"""

from __future__ import annotations

import logging
import time

import click
import torch

from benchmarks import bench_step, clock, common, contenders, steps

ROWS = {str(row): row for row in [*bench_step.ON_A_GPU, *bench_step.ON_A_CPU]}


@click.command()
@click.argument("name", type=click.Choice(list(ROWS)), metavar="ROW")
@click.option("--contender", "who", type=click.Choice(["strong", "ours", "reference"]), default="strong")
@click.option("--kernels", default=25, show_default=True, help="So many lines of the profile.")
def main(name: str, who: str, kernels: int) -> None:
    """Time a contender on a ROW of bench_step and print its most expensive kernels."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("clone_fast").setLevel(logging.INFO)  # how long its kernels took to compile
    row = ROWS[name]
    with contenders.arithmetic(row.precision):
        world = contenders.World(row, common.DEVICE)
        start = time.perf_counter()
        if who == "strong":
            found = contenders.strong(world, steps.compiled if common.ON_GPU else None)
        else:
            found = contenders.reference(world) if who == "reference" else contenders.ours(world)
        values = found.run(1).tolist()
        click.echo(f"{name}, {found.how}: first step after {time.perf_counter() - start:.1f} s, values {values}")
        click.echo(f"by the wall: {clock.by_the_wall(found.run).p50 / 1e3:.3f} ms")
        if not common.ON_GPU:
            return
        click.echo(f"peak memory: {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
        step = found.step
        if step is not None and who == "strong":
            times = clock.captured(lambda _: step(), [None])
            click.echo(f"graph: {times.p50 / 1e3:.3f} ms ({times.p20 / 1e3:.3f} to {times.p80 / 1e3:.3f})")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            found.run(1)
            torch.cuda.synchronize()
        click.echo(
            profile.key_averages().table(sort_by="self_device_time_total", row_limit=kernels, max_name_column_width=90)
        )


if __name__ == "__main__":
    main()

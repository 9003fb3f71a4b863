"""The end of a run: on a GPU its rows, printed and kept; elsewhere what the rows are not."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import clock, common, compat_table, invert_table, step_table, tables


def _about() -> dict[str, object]:
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": common.commit(),
        "copy_tb_per_s": clock.copy_bandwidth() / 1e12,
        "bf16_tflop_per_s": clock.matrix_rate(torch.bfloat16, False) / 1e12,
        "tf32_tflop_per_s": clock.matrix_rate(torch.float32, True) / 1e12,
    }


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not common.ON_GPU:
        terminalreporter.write_line("no CUDA device: small shapes ran, on the CPU, in float32")
        return
    if step_table.ROWS:
        terminalreporter.write_line(step_table.table(step_table.ROWS))
        terminalreporter.write_line(f"written: {step_table.RESULTS.relative_to(tables.ROOT)}")
    if invert_table.ROWS:
        terminalreporter.write_line(invert_table.block(invert_table.ROWS))
        terminalreporter.write_line(f"written: {invert_table.RESULTS.relative_to(tables.ROOT)}")
    if compat_table.ROWS:
        terminalreporter.write_line(compat_table.block(compat_table.ROWS))
        terminalreporter.write_line(f"written: {compat_table.RESULTS.relative_to(tables.ROOT)}")
    if not common.ROWS:
        return
    for row in common.ROWS:
        words = [f"{row['op']:17} {tables.where(row):42}", "fwd+bwd" if row["backward"] else "fwd    ", row["backend"]]
        words += [f"{row['us']:8.1f} us  {row['over_floor']:5.2f} x floor", f"{row['gb_per_s']:6.0f} GB/s"]
        words += [f"{row['tflop_per_s']:4.0f} TFLOP/s", f"copy {row['copy_us']:.1f}", f"eager {row['eager_us']:.1f}"]
        words += [
            f"{name} {row[key]:.1f}" for name, key in (("compiled", "compiled_us"), ("cuDNN", "cudnn_us")) if key in row
        ]
        terminalreporter.write_line("  ".join(words))
    results = {"about": _about(), "rows": common.ROWS}
    tables.RESULTS.parent.mkdir(exist_ok=True)
    tables.RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    terminalreporter.write_line(tables.targets_table(common.ROWS))
    terminalreporter.write_line(f"written: {tables.RESULTS.relative_to(tables.ROOT)}")

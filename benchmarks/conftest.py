"""Says, once and at the end, what the rows are not where there is no GPU."""

from __future__ import annotations

import pytest
import torch


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not torch.cuda.is_available():
        terminalreporter.write_line("no CUDA device: small shapes ran, on the CPU, in float32")

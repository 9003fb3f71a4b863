"""Other codebases' dialects, translated to our ops: two lines make their networks fast."""

from __future__ import annotations

from clone_fast.compat.installation import accelerate, install, installed, uninstall
from clone_fast.compat.report import Report

__all__ = ["Report", "accelerate", "install", "installed", "uninstall"]

"""Other codebases' dialects, translated to our ops: two lines make their networks fast."""

from __future__ import annotations

from clone_fast.compat.installation import install, installed, uninstall
from clone_fast.compat.report import Report

__all__ = ["Report", "install", "installed", "uninstall"]

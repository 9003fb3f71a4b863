"""Files of results: rows that are written as soon as they are known, a later run's in the place of an earlier one's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "results"

Row = dict[str, Any]


def merged(before: Sequence[Row], now: Sequence[Row], key: Sequence[str]) -> list[Row]:
    """The rows of an earlier run with those of this one in their place, since one run need not hold them all."""
    return list({tuple(row[name] for name in key): row for row in [*before, *now]}.values())


def kept(now: Sequence[Row], path: Path, key: Sequence[str]) -> list[Row]:
    """Write rows, which `key` tells apart, beside those that the file holds; returns all."""
    rows = merged(json.loads(path.read_text()) if path.exists() else [], now, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def origin(rows: Sequence[Row]) -> str:
    """Where the rows of a file come from: devices, torch and commits, each named once."""
    parts = [dict.fromkeys(str(row[name]) for row in rows if name in row) for name in ("device", "torch", "commit")]
    return "{}, torch {}, commit {}".format(*(" and ".join(part) for part in parts))
